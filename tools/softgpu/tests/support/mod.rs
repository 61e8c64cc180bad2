//! What the tests share: a card with memory, and kernels run by name.
#![allow(dead_code, reason = "each test program uses a part")]

use softgpu::card::Card;
use softgpu::machine::{self, Counters, Fault, Launch, Options, Vectors};
use softgpu::memory::{Kind, Memory};
use softgpu::ptx::{self, Module};

/// The instruction sets of the host.
pub const VECTORS: [Vectors; 3] = [Vectors::Base, Vectors::Avx2, Vectors::Avx512];

/// A card with memory and the kernels of one PTX text.
pub struct Gpu {
    pub card: &'static Card,
    pub memory: Memory,
    pub module: Module,
}

/// A parameter of a kernel.
#[derive(Clone, Copy)]
pub enum Arg {
    U32(u32),
    U64(u64),
}

impl Gpu {
    pub fn new(text: &str) -> Gpu {
        Gpu::on("h200", text)
    }

    pub fn on(card: &str, text: &str) -> Gpu {
        let card = Card::find(card).expect("the card exists");
        let memory = Memory::new(card);
        let mut module = ptx::load(text, card).unwrap_or_else(|e| panic!("{e}"));
        module.place(&memory).expect("there is memory");
        Gpu { card, memory, module }
    }

    /// Allocates and fills device memory.
    pub fn upload<T: Copy>(&self, name: &str, values: &[T]) -> u64 {
        let address = self.memory.allocate(size_of_val(values), Kind::Device, name).expect("there is memory");
        // SAFETY: the source is a slice.
        unsafe {
            self.memory.copy_in(address, values.as_ptr().cast(), size_of_val(values)).expect("in bounds")
        };
        address
    }

    /// Allocates device memory that counts as never written.
    pub fn fresh(&self, name: &str, bytes: usize) -> u64 {
        self.memory.allocate(bytes, Kind::Device, name).expect("there is memory")
    }

    pub fn download<T: Copy + Default>(&self, address: u64, count: usize) -> Vec<T> {
        let mut out = vec![T::default(); count];
        // SAFETY: the destination has this size.
        unsafe {
            self.memory.copy_out(out.as_mut_ptr().cast(), address, size_of_val(&out[..])).expect("in bounds")
        };
        out
    }

    pub fn launch(&self, name: &str, grid: u32, block: u32, args: &[Arg]) -> Launch {
        let kernel = self.module.kernel(name).unwrap_or_else(|| panic!("no kernel {name}"));
        let mut params = Vec::new();
        for (arg, param) in args.iter().zip(&kernel.params) {
            params.resize(param.offset as usize, 0);
            match arg {
                Arg::U32(x) => params.extend(x.to_le_bytes()),
                Arg::U64(x) => params.extend(x.to_le_bytes()),
            }
        }
        assert_eq!(args.len(), kernel.params.len(), "arguments of {name}");
        Launch { kernel, grid: [grid, 1, 1], block: [block, 1, 1], shared: 0, params, dependent: false }
    }

    pub fn run(&self, launches: &[Launch], schedule: u64) -> Result<Vec<Counters>, Fault> {
        self.run_with(launches, &Options { schedule, ..Options::default() })
    }

    pub fn run_with(&self, launches: &[Launch], options: &Options) -> Result<Vec<Counters>, Fault> {
        machine::run(launches, &self.memory, self.card, options)
    }
}

/// Random numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
