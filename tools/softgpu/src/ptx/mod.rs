//! PTX text to kernels. Everything that is not known is an error with its line: a directive, an opcode, a modifier, a type.

mod allocate;
mod collective;
mod decode;
mod lexer;
mod operands;
mod parser;
pub(crate) mod program;
mod rows;

pub use program::{Kernel, Param};

use crate::card::Card;
use crate::memory::{Kind, Memory, OutOfMemory};
use allocate::Decoded;
use program::Constant;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Why PTX was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The line of the PTX text, from 1.
    pub line: u32,
    /// What is wrong there.
    pub message: String,
}

impl Error {
    fn new(line: u32, message: impl Into<String>) -> Error {
        Error { line, message: message.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "ptx line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for Error {}

/// A variable of the module in global or constant memory.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub name: String,
    pub bytes: usize,
    /// The initial value; zeros follow it. `None`: the memory counts as zeroed.
    pub data: Vec<u8>,
}

/// A kernel of a module. Its registers get their rows when it is asked for first: most programs use few of the kernels.
#[derive(Debug)]
struct Entry {
    decoded: Decoded,
    ready: OnceLock<Arc<Kernel>>,
}

impl Entry {
    fn kernel(&self) -> &Arc<Kernel> {
        self.ready.get_or_init(|| Arc::new(self.decoded.finish()))
    }
}

/// The kernels and variables of one PTX text.
#[derive(Debug)]
pub struct Module {
    kernels: Vec<Entry>,
    variables: Vec<Variable>,
    addresses: Vec<u64>,
}

impl Module {
    /// All kernels, in the order of the text.
    pub fn kernels(&self) -> impl Iterator<Item = &Arc<Kernel>> {
        self.kernels.iter().map(Entry::kernel)
    }

    /// The kernel with this name.
    pub fn kernel(&self, name: &str) -> Option<Arc<Kernel>> {
        self.kernels.iter().find(|k| k.decoded.kernel.name == name).map(|k| k.kernel().clone())
    }

    /// The address and the bytes of a variable, once [`Module::place`] has run.
    pub fn variable(&self, name: &str) -> Option<(u64, usize)> {
        let index = self.variables.iter().position(|v| v.name == name)?;
        Some((*self.addresses.get(index)?, self.variables[index].bytes))
    }

    /// Allocates the module's variables, writes their initial values and gives the kernels their addresses. To be called
    /// once, before a kernel runs. [`Module::addresses`] has what is to be freed with the module.
    ///
    /// # Errors
    /// [`OutOfMemory`]. What was allocated before stays listed in [`Module::addresses`].
    pub fn place(&mut self, memory: &Memory) -> Result<(), OutOfMemory> {
        for variable in &self.variables {
            let address = memory.allocate(variable.bytes, Kind::Module, &variable.name)?;
            self.addresses.push(address);
            memory.set(address, 0, variable.bytes).expect("the range was just allocated");
            // SAFETY: the source is a slice of this length.
            unsafe { memory.copy_in(address, variable.data.as_ptr(), variable.data.len()) }
                .expect("the initial value is no longer than the variable");
        }
        for entry in &mut self.kernels {
            entry.ready.take();
            let kernel = &mut entry.decoded.kernel;
            for (value, (constant, _)) in kernel.values.iter_mut().zip(&kernel.constants) {
                *value = match *constant {
                    Constant::Bits(bits) => bits,
                    Constant::DynamicShared(offset) => u64::from(kernel.dynamic_start).wrapping_add(offset),
                    Constant::Param(_) => 0,
                    Constant::Variable(index, offset) => self.addresses[index as usize].wrapping_add(offset),
                };
            }
        }
        Ok(())
    }

    /// The addresses of the module's variables.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
    }
}

/// Parses PTX as the driver of `card` would.
///
/// # Errors
/// [`Error`] if the text is no PTX, if it is for another GPU, or if it uses something that this machine does not know.
pub fn load(text: &str, card: &Card) -> Result<Module, Error> {
    let (kernels, variables) = parser::parse(text, card)?;
    let kernels = kernels.into_iter().map(|decoded| Entry { decoded, ready: OnceLock::new() }).collect();
    Ok(Module { kernels, variables, addresses: Vec::new() })
}
