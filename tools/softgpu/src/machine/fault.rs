//! What went wrong, and where.

use crate::ptx::Kernel;
use std::fmt;

/// What kind of error it is, as far as a driver tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An access to memory that is not there.
    OutOfBounds,
    Misaligned,
    Other,
}

/// An error of a kernel: a report that names the place in the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub cause: Cause,
    /// The name of the kernel.
    pub kernel: Box<str>,
    /// The block's index.
    pub block: [u32; 3],
    /// The thread's index in the block, if one thread is to blame.
    pub thread: Option<[u32; 3]>,
    /// The .cu file and line, and the line of the PTX.
    pub place: Box<str>,
    /// The global address, if one is involved.
    pub address: Option<u64>,
    /// What is wrong.
    pub sentence: Box<str>,
    /// Other places that are involved, one sentence each.
    pub notes: Vec<String>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "{}: {}\n  in {}, block ({x}, {y}, {z})", self.place, self.sentence, self.kernel)?;
        if let Some([x, y, z]) = self.thread {
            write!(f, ", thread ({x}, {y}, {z})")?;
        }
        for note in &self.notes {
            write!(f, "\n  {note}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// An error while its place is still known only as an instruction and a lane.
#[derive(Debug)]
pub(super) struct Trouble {
    pub cause: Cause,
    pub sentence: String,
    pub lane: Option<usize>,
    pub address: Option<u64>,
    pub notes: Vec<String>,
    /// Other accesses of the block: what they are, their instruction and their thread.
    pub others: Vec<(&'static str, usize, u32)>,
}

impl Trouble {
    pub fn new(sentence: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble {
            cause: Cause::Other,
            sentence: sentence.into(),
            lane: None,
            address: None,
            notes: Vec::new(),
            others: Vec::new(),
        })
    }

    pub fn lane(mut self: Box<Self>, lane: usize) -> Box<Trouble> {
        self.lane.get_or_insert(lane);
        self
    }

    pub fn cause(mut self: Box<Self>, cause: Cause) -> Box<Trouble> {
        self.cause = cause;
        self
    }

    pub fn at(mut self: Box<Self>, address: u64) -> Box<Trouble> {
        self.address = Some(address);
        self
    }

    pub fn note(mut self: Box<Self>, note: String) -> Box<Trouble> {
        self.notes.push(note);
        self
    }

    pub fn other(mut self: Box<Self>, what: &'static str, pc: usize, thread: u32) -> Box<Trouble> {
        self.others.push((what, pc, thread));
        self
    }

    /// The report, with the place filled in.
    pub fn report(self, kernel: &Kernel, pc: usize, block: [u32; 3], shape: [u32; 3], warp: usize) -> Fault {
        let index =
            |thread: u32| [thread % shape[0], thread / shape[0] % shape[1], thread / shape[0] / shape[1]];
        let mut notes = self.notes;
        for (what, pc, thread) in self.others {
            let [x, y, z] = index(thread);
            notes.push(format!("{what}: {}, thread ({x}, {y}, {z})", kernel.place(pc)));
        }
        Fault {
            cause: self.cause,
            kernel: kernel.name.as_str().into(),
            block,
            thread: self.lane.map(|lane| index((warp * 32 + lane) as u32)),
            place: kernel.place(pc).into(),
            address: self.address,
            sentence: self.sentence.into(),
            notes,
        }
    }
}
