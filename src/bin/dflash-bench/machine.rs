//! What a record says of the machine that something ran on, and whether it was hindered while it did.

use crate::record::{Machine, State};
use dflash::device::Properties;
use dflash::place::Place;

/// The card's own instruments, where there are any.
pub struct Instruments {
    before: Option<State>,
}

impl Instruments {
    /// Of what runs at `place`. Without instruments every answer is None.
    pub fn open(_place: &Place) -> Instruments {
        Instruments { before: None }
    }

    /// Clocks, power, and what else is known now.
    pub fn state(&self) -> Option<State> {
        None
    }

    /// Whether the card holds its clocks back now.
    pub fn is_throttled(&self) -> Option<bool> {
        self.state().map(|state| !state.throttle.is_empty())
    }

    /// For the record, at the end of the run.
    pub fn machine(&self, place: &Place) -> Machine {
        let Properties { name, driver, capability, multiprocessors, l2, memory, overlap, .. } =
            place.device.properties();
        let gpu = place.name == "cuda";
        Machine {
            device: Some(place.name.into()),
            card: gpu.then(|| name.clone()),
            driver: gpu.then(|| format!("CUDA {}.{}", driver / 1000, driver % 1000 / 10)),
            memory_gigabytes: gpu.then_some(*memory as f64 / 1e9),
            capability: gpu.then(|| format!("{}.{}", capability.0, capability.1)),
            multiprocessors: gpu.then_some(*multiprocessors),
            l2_bytes: gpu.then_some(*l2),
            ptx: gpu.then(|| if *overlap { "compute_90a" } else { "compute_80" }.into()),
            before: self.before.clone(),
            after: self.state(),
            ..Machine::default()
        }
    }
}
