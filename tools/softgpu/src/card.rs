//! The GPUs that the software GPU can stand in for: the limits and sizes that a program can ask for, and that
//! decide which launches are legal and how many blocks are resident. Figures are those that NVIDIA publishes
//! for the product and its compute capability; memory is what `nvidia-smi` shows.

const KIB: u32 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A GPU model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// The name by which a user chooses it.
    pub name: &'static str,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    /// Shared memory of a block without opting in to more, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of a block at most, in bytes.
    pub shared_per_block_optin: u32,
    /// Shared memory of a multiprocessor, in bytes.
    pub shared_per_multiprocessor: u32,
    /// Shared memory that the system takes for each resident block, in bytes.
    pub shared_reserved: u32,
    /// 32-bit registers of a block at most, and of a multiprocessor.
    pub registers: u32,
    pub threads_per_block: u32,
    /// Resident threads of a multiprocessor at most.
    pub threads_per_multiprocessor: u32,
    /// Resident blocks of a multiprocessor at most.
    pub blocks_per_multiprocessor: u32,
    /// L2 cache, in bytes.
    pub l2: u64,
    /// Global memory, in bytes.
    pub memory: u64,
}

impl Card {
    /// The card that is used unless another is chosen.
    pub const DEFAULT: &str = "h200";

    /// The card with this name.
    pub fn find(name: &str) -> Option<&'static Card> {
        CARDS.iter().find(|card| card.name == name)
    }

    /// Whether kernels may overlap their predecessor (programmatic dependent launch).
    pub fn has_dependent_launch(&self) -> bool {
        self.capability.0 >= 9
    }
}

const fn card(
    name: &'static str,
    capability: (u32, u32),
    multiprocessors: u32,
    l2: u64,
    memory: u64,
) -> Card {
    // Shared memory, resident threads and resident blocks of a multiprocessor follow from the compute
    // capability.
    let (shared, reserved, threads, blocks) = match capability {
        (7, 5) => (64 * KIB, 0, 1024, 16),
        (8, 0) => (164 * KIB, KIB, 2048, 32),
        (8, 9) | (12, 0) => (100 * KIB, KIB, 1536, 24),
        _ => (228 * KIB, KIB, 2048, 32),
    };
    Card {
        name,
        capability,
        multiprocessors,
        shared_per_block: 48 * KIB,
        shared_per_block_optin: shared - reserved,
        shared_per_multiprocessor: shared,
        shared_reserved: reserved,
        registers: 64 * KIB,
        threads_per_block: 1024,
        threads_per_multiprocessor: threads,
        blocks_per_multiprocessor: blocks,
        l2: l2 * MIB,
        memory: memory * MIB,
    }
}

/// All cards. `t4` is there for programs that must refuse a card older than compute capability 8.0.
pub const CARDS: &[Card] = &[
    card("t4", (7, 5), 40, 4, 15360),
    card("a100", (8, 0), 108, 40, 81920),
    card("rtx4090", (8, 9), 128, 72, 24564),
    card("l40s", (8, 9), 142, 96, 46068),
    card("h100", (9, 0), 132, 50, 81559),
    card("h200", (9, 0), 132, 50, 143771),
    card("b200", (10, 0), 148, 126, 183359),
    card("rtx5090", (12, 0), 170, 96, 32607),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_default_exists() {
        for card in CARDS {
            assert_eq!(Card::find(card.name), Some(card));
        }
        assert!(Card::find(Card::DEFAULT).is_some());
        assert_eq!(Card::find("voodoo2"), None);
    }

    #[test]
    fn h200_has_227_kib_of_shared_memory_for_a_block() {
        let card = Card::find("h200").unwrap();
        assert_eq!((card.shared_per_block_optin, card.shared_per_multiprocessor), (232_448, 233_472));
    }
}
