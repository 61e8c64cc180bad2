//! The kernels of rounds with best-first trees, other than linear layers and attention: the drafter's
//! choices, trees made of them, and moving the keys and values of accepted paths.

use super::linear::in_pages;
use super::round::{ANCHOR, LENGTH, Logits, NONE, case, greedy, sequence};
use super::values::{below, ends, equal, halves_of, longs_of, words_of};
use super::{Case, MAX_BLOCK, Ready};
use dflash::Result;
use dflash::checkpoint::config::Stack;
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::Buffer;
use dflash::gpu::kernels::PAGE;
use dflash::gpu::kernels::choices::Choices;
use dflash::gpu::kernels::compact::Compact;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::round::{DraftShape, Sequence};
use dflash::gpu::kernels::sample::{self, SamplerInputs};
use dflash::gpu::kernels::tree::{TreeBuild, Trees};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::tree::{self, Choice, MAX_TREE_ROWS, Tree};
use serde_json::{Value, json};

/// Upper bound of the difference between the costs of a choice and of the one before it, in units of 2^-16
/// bits. Trees of such choices have several branches, some of them several rows long.
const COST_STEP: usize = 3 << 16;

/// For each of `rows`: the choices of that many drafted rows; and for trees with that many rows in total,
/// building them and moving their longest paths. None without a drafter.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let Some(levels) = levels(pair) else { return vec![] };
    let mut all = vec![];
    for &rows in rows {
        let blocks = Shape { n: target.vocab, k: target.stack.hidden }.blocks();
        all.push(choices(Choices {
            rows,
            vocab: target.vocab,
            blocks,
            reduced: false,
            per_row: MAX_TREE_ROWS - 1,
        }));
        if let Some((sequences, rows)) = shape(pair, rows) {
            all.push(build(TreeBuild {
                sequences,
                block: levels + 1,
                max_verify_rows: rows,
                per_row: rows - 1,
            }));
            all.extend(compact(&target.stack, random_trees(pair, sequences, rows), rows));
        }
    }
    all
}

/// Divides `rows` rows into trees, as (sequences, rows of each): as few sequences as the kernels allow. None
/// without a drafter, or if each tree would have only its anchor.
pub fn shape(pair: &Pair, rows: usize) -> Option<(usize, usize)> {
    levels(pair)?;
    let sequences = (1..=rows).find(|n| rows.is_multiple_of(*n) && rows / n <= MAX_TREE_ROWS)?;
    Some((sequences, rows / sequences)).filter(|(_, each)| *each > 1)
}

/// Trees of `rows` rows, made of random choices.
pub fn random_trees(pair: &Pair, sequences: usize, rows: usize) -> Vec<Tree> {
    let levels = levels(pair).unwrap_or(0);
    (0..sequences).map(|own| Tree::best_first(ANCHOR, &random_choices(own, levels, rows - 1), rows)).collect()
}

/// Number of tokens that the drafter drafts in a block.
pub fn levels(pair: &Pair) -> Option<usize> {
    let block = pair.drafter()?.config.block.min(MAX_BLOCK);
    block.checked_sub(1).filter(|levels| *levels > 0)
}

/// The `per_row` best tokens of each of `levels` rows of a sequence, at random.
fn random_choices(own: usize, levels: usize, per_row: usize) -> Vec<Vec<Choice>> {
    let level = |level: usize| {
        let mut cost = 0;
        let choice = |rank: usize| {
            let i = (own * MAX_BLOCK + level) * MAX_TREE_ROWS + rank;
            cost += below(i, COST_STEP) as u32;
            Choice { token: i as u32, cost }
        };
        (0..per_row).map(choice).collect()
    };
    (0..levels).map(level).collect()
}

fn parameters(sequences: usize, rows: usize) -> Value {
    json!({ "rows": sequences * rows, "batch": sequences })
}

/// (token, cost) of each choice, padded to `per_row` choices.
fn words(choices: &[Choice], per_row: usize) -> Vec<u32> {
    let mut words: Vec<u32> = choices.iter().flat_map(|choice| [choice.token, choice.cost]).collect();
    words.resize(per_row * 2, NONE);
    words
}

fn choices(kernel: Choices) -> Case {
    let Choices { rows, vocab, blocks, per_row, .. } = kernel;
    case("choices", json!({ "rows": rows }), kernel.bytes(), move |fixtures| {
        let device = fixtures.device;
        let logits = Logits::new(fixtures, rows, vocab)?;
        let best = fixtures.bytes(&logits.best(blocks).concat())?;
        let table = fixtures.words((0..rows).flat_map(|row| [0, LENGTH + row as u32, NONE, NONE]))?;
        let tables = fixtures.bytes(&sample::tables())?;
        device.seal(&tables);
        let (list, counts) = (fixtures.output(rows * per_row * 8)?, fixtures.output(rows * 4)?);
        let (from, to) = (logits.buffer(), [&list, &counts].map(Buffer::clone));
        let (partial, counters) = (fixtures.output(rows * vocab.div_ceil(8192) * 8)?, fixtures.zeros(rows)?);
        let launch = move |_| {
            let inputs = SamplerInputs {
                logits: &from,
                sequences: &table,
                tables: &tables,
                partial: &partial,
                counters: &counters,
            };
            kernel.launch(device, &to[0], &to[1], &best, &table, inputs)
        };
        let check = move || {
            let (list, counts) = (words_of(device, &list)?, words_of(device, &counts)?);
            for row in logits.checked_rows() {
                let expected = tree::choices(&logits.row(row), per_row).unwrap_or_default();
                equal("count of a row", &counts[row..=row], &[expected.len() as u32])?;
                equal(
                    "word of choices",
                    &list[row * per_row * 2..][..per_row * 2],
                    &words(&expected, per_row),
                )?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

fn build(kernel: TreeBuild) -> Case {
    let TreeBuild { sequences, block, max_verify_rows: rows, per_row } = kernel;
    case("tree_build", parameters(sequences, rows), kernel.bytes(), move |fixtures| {
        let device = fixtures.device;
        let all: Vec<Vec<Vec<Choice>>> =
            (0..sequences).map(|own| random_choices(own, block - 1, per_row)).collect();
        // The first row of a block is the anchor's and has no choices.
        let of_block = |levels: &Vec<Vec<Choice>>| {
            let choices = levels.iter().flat_map(|choices| words(choices, per_row));
            vec![NONE; per_row * 2].into_iter().chain(choices).collect::<Vec<u32>>()
        };
        let list = fixtures.words(all.iter().flat_map(of_block))?;
        let counts = fixtures.words((0..sequences * block).map(|_| per_row as u32))?;
        let state = Sequence { rows: rows as u32, form: DraftShape::BestFirst, ..sequence(block, greedy()) };
        let states = fixtures.bytes(&state.to_bytes()?.repeat(sequences))?;
        // For chains and for sampled trees; there are none here.
        let drafts = fixtures.words(vec![NONE; sequences * block])?;
        let typical = fixtures.words(vec![NONE; per_row])?;
        let [tokens, parents, masks, table, spans] =
            [rows * 4, rows * 4, rows * 8, rows * 16, 8].map(|bytes| fixtures.output(sequences * bytes));
        let to = [tokens?, parents?, masks?, table?, spans?];
        let written = to.clone();
        let launch = move |_| {
            let [tokens, parents, masks, table, spans] = &to;
            kernel.launch(
                device,
                Trees { tokens, parents, masks, table, spans },
                &list,
                &counts,
                &drafts,
                &typical,
                &states,
                None,
            )
        };
        let check = move || {
            let trees: Vec<Tree> =
                all.iter().map(|choices| Tree::best_first(ANCHOR, choices, rows)).collect();
            let [tokens, parents, masks, table, spans] = &written;
            let each = |of: fn(&Tree) -> &[u32]| trees.iter().flat_map(of).copied().collect::<Vec<u32>>();
            equal("token", &words_of(device, tokens)?, &each(|tree| &tree.tokens))?;
            equal("parent", &words_of(device, parents)?, &each(|tree| &tree.parents))?;
            let bits: Vec<u64> = trees.iter().flat_map(|tree| &tree.masks).copied().collect();
            equal("mask", &longs_of(device, masks)?, &bits)?;
            let row = |(i, depth): (u32, &u32)| {
                let own = i / rows as u32;
                [own, LENGTH + depth, LENGTH + i % rows as u32, i]
            };
            let depths = trees.iter().flat_map(|tree| &tree.depths);
            let entries: Vec<u32> = (0..).zip(depths).flat_map(row).collect();
            equal("row", &words_of(device, table)?, &entries)?;
            equal("span", &words_of(device, spans)?, &[LENGTH, rows as u32].repeat(sequences))
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// None if no row of a path has to move.
fn compact(c: &Stack, trees: Vec<Tree>, rows: usize) -> Option<Case> {
    let paths = trees.iter().map(|tree| {
        let moved = |row: &usize| tree::compaction_moves(&tree.path(*row).collect::<Vec<_>>()).count();
        let last = (0..tree.rows()).max_by_key(moved).unwrap_or(0);
        tree.path(last).collect()
    });
    let paths: Vec<Vec<usize>> = paths.collect();
    let moved = paths.iter().map(|path| tree::compaction_moves(path).count()).sum();
    let (sequences, each) = (trees.len(), (LENGTH as usize + rows).div_ceil(PAGE));
    let kernel = Compact {
        sequences,
        rows,
        layers: c.attention.len(),
        kv_heads: c.kv_heads,
        head_dim: c.head_dim,
        pages: sequences * each,
        sequence_pages: each,
    };
    let Compact { layers, kv_heads, head_dim, pages, .. } = kernel;
    let made = case("compact", parameters(sequences, rows), kernel.bytes(moved), move |fixtures| {
        let device = fixtures.device;
        // [layers][keys, values][pages][kv_heads][PAGE][head_dim]
        let words = pages * kv_heads * PAGE * head_dim;
        let before = fixtures.halves(layers * 2 * words, 1.0, "keys and values")?;
        let caches = fixtures.output(layers * 2 * words * 2)?;
        device.copy(&caches, &before.buffer)?;
        let side = |layer: usize, side: usize| caches.slice((layer * 2 + side) * words * 2, words * 2);
        let [keys, values] = [0, 1].map(|of| (0..layers).map(|layer| side(layer, of)).collect::<Result<_>>());
        let (keys, values): (Vec<Buffer>, Vec<Buffer>) = (keys?, values?);
        let addresses = fixtures.bytes(&kernel.cache_addresses(&keys, &values)?)?;
        // Pages in descending order.
        let page = move |own: usize, slot: usize| pages - 1 - (own * each + slot / PAGE);
        let table = fixtures.words((0..pages).map(|place| (pages - 1 - place) as u32))?;
        let accepted = fixtures.words(paths.iter().map(|path| path.len() as u32 - 1))?;
        let next = fixtures.zeros(sequences)?;
        let row = |path: &Vec<usize>, to: usize| path.get(to).map_or(NONE, |from| *from as u32);
        let path = fixtures
            .words(paths.iter().flat_map(|path| (0..rows).map(|to| row(path, to)).collect::<Vec<_>>()))?;
        let spans = fixtures.words([LENGTH, rows as u32].repeat(sequences))?;
        let launch = move |_| {
            let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            kernel.launch(device, &addresses, &table, output, &spans)
        };
        let paths = paths.clone();
        let check = move || {
            for layer in ends(layers) {
                for (side, cache) in [&keys[layer], &values[layer]].into_iter().enumerate() {
                    let (found, first) = (halves_of(device, cache)?, (layer * 2 + side) * words);
                    for i in 0..sequences * kv_heads * rows {
                        let (own, head, row) = (i / rows / kv_heads, i / rows % kv_heads, i % rows);
                        let at = |row: usize, d: usize| {
                            let slot = LENGTH as usize + row;
                            in_pages(page(own, slot), head, kv_heads, slot, d, head_dim)
                        };
                        let from = paths[own].get(row).copied().unwrap_or(row);
                        let got: Vec<f32> = (0..head_dim).map(|d| found[at(row, d)]).collect();
                        let expected: Vec<f32> =
                            (0..head_dim).map(|d| before.at(first + at(from, d))).collect();
                        equal("element of a moved row", &got, &expected)?;
                    }
                }
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    });
    Some(made).filter(|_| moved > 0)
}
