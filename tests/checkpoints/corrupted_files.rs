//! Randomly corrupted checkpoint files: opening them succeeds, or fails with a one-line error, without a
//! panic or a large allocation.

use crate::support;

use dflash::Error;
use dflash::checkpoint::config::{DrafterConfig, TargetConfig};
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
use dflash::text::tokenizer::Text;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use support::{Target, disk, open_all, small, write_pair};

/// An allocator that records the largest single allocation of each thread.
struct LargestAllocation;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for LargestAllocation {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: LargestAllocation = LargestAllocation;

/// The files of a pair, and whether each belongs to the target.
const FILES: [(bool, &str); 9] = [
    (true, "config.json"),
    (true, "generation_config.json"),
    (true, "model.safetensors.index.json"),
    (true, "model-00001-of-00002.safetensors"),
    (true, "model-00002-of-00002.safetensors"),
    (true, "tokenizer.json"),
    (true, "tokenizer_config.json"),
    (false, "config.json"),
    (false, "model.safetensors"),
];

/// The contents of [`FILES`] for a valid pair.
static VALID: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let (target, drafter) = small();
    let pair = write_pair(&Target { shards: 2, ..target }, &drafter);
    let folder = |of_target| if of_target { &pair.target } else { &pair.drafter };
    FILES.iter().map(|(of_target, name)| fs::read(folder(*of_target).join(name)).unwrap()).collect()
});

/// One change to a file. Positions are taken modulo the size of the file or of its JSON.
#[derive(Debug, Clone)]
enum Corruption {
    Flip {
        at: usize,
        bit: u8,
    },
    Truncate {
        at: usize,
    },
    Splice {
        from: usize,
        length: usize,
        to: usize,
    },
    /// Replaces a value by this JSON text, which need not be valid.
    Field {
        at: usize,
        text: String,
    },
    /// Gives an object its first key again, with its last value.
    Repeat {
        at: usize,
    },
}

fn corruption() -> impl Strategy<Value = Corruption> {
    let values = [
        json!("\u{1b}[2J\n\0"),
        json!("../.."),
        json!({ "rope_type": "yarn", "factor": 1e300, "beta_fast": 1e-300, "beta_slow": 1e-300 }),
        json!({ "rope_type": "llama3", "factor": 1e300, "low_freq_factor": 1e-300, "high_freq_factor": 1e300,
                "original_max_position_embeddings": 1 }),
        json!({ "dtype": "F32", "shape": [1], "data_offsets": [0, 4] }),
    ]
    .map(|value| value.to_string());
    let texts = "null true 0 1 3 -1 -0 1.5 1.0 1e308 1e-308 1e999 -1e999 NaN -Infinity 1024 16777216 4294967296 \
                 18446744073709551615 -9223372036854775808 99999999999999999999999 \"\" [] [0,1] [[1e300]] {} \
                 {\"a\":1,\"a\":2} [0,18446744073709551615] [9223372036854775807,9223372036854775807] // \u{feff}";
    let texts = texts.split(' ').map(String::from);
    let nested = [100, 127, 100_000].map(|depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth)));
    let long =
        [format!("\"{}\"", "a".repeat(100_000)), format!("[{}0]", "0,".repeat(100_000)), "9".repeat(10_000)];
    let texts: Vec<String> = texts.chain(values).chain(nested).chain(long).collect();
    prop_oneof![
        (any::<usize>(), 0..8u8).prop_map(|(at, bit)| Corruption::Flip { at, bit }),
        any::<usize>().prop_map(|at| Corruption::Truncate { at }),
        (any::<usize>(), 1..64usize, any::<usize>()).prop_map(|(from, length, to)| Corruption::Splice {
            from,
            length,
            to
        }),
        (any::<usize>(), proptest::sample::select(texts))
            .prop_map(|(at, text)| Corruption::Field { at, text }),
        any::<usize>().prop_map(|at| Corruption::Repeat { at }),
    ]
}

/// The value number `at` of a JSON tree in preorder, where the tree itself is number 0.
fn nth_value<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|v| nth_value(v, at)),
        Value::Object(map) => map.values_mut().find_map(|v| nth_value(v, at)),
        _ => None,
    }
}

/// The number of values in a JSON tree, the tree itself included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The byte range of a file's JSON: a safetensors header, or the whole file.
fn json_range(file: &[u8]) -> (usize, usize) {
    match file.first_chunk::<8>().map(|n| u64::from_le_bytes(*n)) {
        Some(n) if n < file.len() as u64 - 8 => (8, 8 + n as usize),
        _ => (0, file.len()),
    }
}

fn apply(corruption: &Corruption, file: &mut Vec<u8>) {
    if file.is_empty() {
        return;
    }
    let (begin, end) = json_range(file);
    match corruption {
        // Half of the bit flips are before the end of the JSON, where they have more effect.
        Corruption::Flip { at, bit } if at % 2 == 0 => file[at / 2 % end] ^= 1 << bit,
        Corruption::Flip { at, bit } => {
            let at = at % file.len();
            file[at] ^= 1 << bit;
        }
        Corruption::Truncate { at } => file.truncate(at % file.len()),
        Corruption::Splice { from, length, to } => {
            let from = from % end;
            let piece = file[from..(from + length).min(end)].to_vec();
            let to = to % end;
            file.splice(to..to, piece);
        }
        Corruption::Field { at, .. } | Corruption::Repeat { at } => {
            let Ok(mut tree) = serde_json::from_slice::<Value>(&file[begin..end]) else { return };
            let mut at = at % count(&tree);
            let value = nth_value(&mut tree, &mut at).unwrap();
            let text = match corruption {
                Corruption::Field { text, .. } => text.clone(),
                _ => {
                    let Some((first, _)) = value.as_object().and_then(|map| map.iter().next()) else {
                        return;
                    };
                    let last = value.as_object().unwrap().values().next_back().unwrap();
                    let repeated = format!("{}:{last}", json!(first));
                    format!("{},{repeated}}}", value.to_string().strip_suffix('}').unwrap())
                }
            };
            *value = json!("PLACE OF THE TEXT");
            let text = tree.to_string().replace("\"PLACE OF THE TEXT\"", &text);
            *file = match begin {
                0 => text.into_bytes(),
                _ => support::safetensors_raw(&text, &file[end..]),
            };
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Opening succeeds or gives a one-line error. It never panics, and no allocation is large compared to
    /// the files.
    #[test]
    fn corrupted_checkpoints_never_panic_or_overallocate(
        edits in prop::collection::vec((0..FILES.len(), corruption()), 1..4)
    ) {
        let root = tempfile::tempdir().unwrap();
        let (target, drafter) = (root.path().join("target"), root.path().join("drafter"));
        fs::create_dir(&target).unwrap();
        fs::create_dir(&drafter).unwrap();
        let mut files = VALID.clone();
        for (which, corruption) in &edits {
            apply(corruption, &mut files[*which]);
        }
        for ((of_target, name), file) in FILES.iter().zip(&files) {
            fs::write(if *of_target { &target } else { &drafter }.join(name), file).unwrap();
        }
        let bytes: usize = files.iter().map(Vec::len).sum();
        let (target, drafter) = (disk(&target), disk(&drafter));

        let start = Instant::now();
        LARGEST.set(0);
        let opened = open_all(&target, &drafter);
        // Open each file separately too, because the check of the pair stops at the first error.
        let parts = [TargetConfig::open(&target).map(|c| c.stack.rope.frequencies()),
            DrafterConfig::open(&drafter).map(|c| c.stack.rope.frequencies())];
        let files = [Checkpoint::open(&target), Checkpoint::open(&drafter)];
        let largest = LARGEST.get();
        let text = Text::find(&target, None).and_then(|text| text.map_or(Ok(vec![]), |text| text.encode("a b")));
        prop_assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());

        // 64 bytes per byte of JSON for its tree, and 1 MiB for the tensor names of the maximum number of
        // layers.
        prop_assert!(largest <= 64 * bytes + (1 << 20), "an allocation of {largest} bytes for files of {bytes}");
        let mut errors: Vec<Error> = files.iter().filter_map(|f| f.as_ref().err().cloned()).collect();
        errors.extend(parts.iter().filter_map(|p| p.as_ref().err().cloned()));
        errors.extend(opened.as_ref().err().cloned());
        errors.extend(text.err());
        for error in errors {
            prop_assert!((2..=4).contains(&error.exit_code()), "{error:?}");
            let sentence = error.to_string();
            prop_assert!(!sentence.contains(char::is_control) && sentence.len() < 1000, "{sentence:?}");
        }
        for (frequencies, magnitude) in parts.iter().flatten() {
            prop_assert!(frequencies.iter().all(|f| f.is_finite()) && magnitude.is_finite(), "{frequencies:?}");
        }
        if let Ok((target, drafter, target_weights, drafter_weights)) = opened {
            for (weights, tensors) in [(target_weights, target.tensors()), (drafter_weights, drafter.tensors())] {
                for (name, shape) in tensors {
                    let tensor = weights.tensor(&name, &shape).unwrap();
                    let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
                    prop_assert_eq!(tensor.bytes().len(), shape.iter().product::<usize>() * size);
                }
            }
        }
    }
}
