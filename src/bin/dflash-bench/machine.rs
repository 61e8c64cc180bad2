//! What a record says of the machine that something ran on, and whether it was hindered while it did.
//!
//! A card is asked through NVML, which comes with the driver and is loaded when it is there. A question that it does not
//! answer is null in the record, and no error.

use crate::record::{Machine, Process, State};
use dflash::cli::device::DeviceHandle;
use dflash::gpu::device::Properties;
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;

/// Why a card runs slower than it could: what hinders it, and what nobody asked for. Idleness is no hindrance, and clocks
/// that somebody set are a choice, by which measurements become steadier.
const HINDRANCES: [(ThrottleReasons, &str); 6] = [
    (ThrottleReasons::SW_POWER_CAP, "power cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hardware thermal slowdown"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hardware power brake"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "thermal slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync boost"),
];

/// The card's own instruments, where there are any.
pub struct Instruments {
    /// And where the card is on the PCI bus: NVML counts cards in another order than CUDA, and all of them.
    card: Option<(Nvml, String)>,
    before: Option<State>,
}

impl Instruments {
    /// Of what runs at `place`, as it is now. Without instruments every answer is None.
    pub fn open(place: &DeviceHandle) -> Instruments {
        // Nothing is loaded for what is no card.
        let pci = place.device.properties().pci.clone();
        Instruments::with(pci.and_then(|pci| Some((Nvml::init().ok()?, pci))))
    }

    fn with(card: Option<(Nvml, String)>) -> Instruments {
        let instruments = Instruments { card, before: None };
        Instruments { before: instruments.state(), ..instruments }
    }

    fn device(&self) -> Option<nvml_wrapper::Device<'_>> {
        let (nvml, pci) = self.card.as_ref()?;
        nvml.device_by_pci_bus_id(pci.as_str()).ok()
    }

    /// Clocks, power, and what else is known now.
    pub fn state(&self) -> Option<State> {
        let device = self.device()?;
        let watts = |milliwatts: u32| f64::from(milliwatts) / 1e3;
        let processes = device.running_compute_processes().ok().map(|all| {
            let others = all.into_iter().filter(|process| process.pid != std::process::id());
            let bytes = |memory| if let UsedGpuMemory::Used(bytes) = memory { Some(bytes) } else { None };
            others
                .map(|process| Process { pid: process.pid, bytes: bytes(process.used_gpu_memory) })
                .collect()
        });
        Some(State {
            sm_mhz: device.clock_info(Clock::SM).ok(),
            memory_mhz: device.clock_info(Clock::Memory).ok(),
            celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            watts: device.power_usage().ok().map(watts),
            limit_watts: device.enforced_power_limit().ok().map(watts),
            throttle: hindrances(&device),
            processes,
        })
    }

    /// Whether the card is hindered now, which it is only while it works.
    pub fn is_throttled(&self) -> Option<bool> {
        Some(!hindrances(&self.device()?)?.is_empty())
    }

    /// For the record, at the end of the run.
    pub fn machine(&self, place: &DeviceHandle) -> Machine {
        let Properties { name, driver, capability, multiprocessors, l2, memory, overlap, .. } =
            place.device.properties();
        let gpu = place.name == "cuda";
        let version = self.card.as_ref().and_then(|(nvml, _)| nvml.sys_driver_version().ok());
        let cuda = format!("CUDA {}.{}", driver / 1000, driver % 1000 / 10);
        Machine {
            device: Some(place.name.into()),
            card: gpu.then(|| name.clone()),
            driver: gpu.then(|| version.map_or(cuda.clone(), |version| format!("{version}, {cuda}"))),
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

fn hindrances(device: &nvml_wrapper::Device) -> Option<Vec<String>> {
    let reasons = device.current_throttle_reasons().ok()?;
    let named = HINDRANCES.iter().filter(|(reason, _)| reasons.contains(*reason));
    Some(named.map(|(_, name)| name.to_string()).collect())
}

/// The state before and after in a line: None where no instruments told it.
pub fn describe(machine: &Machine) -> Option<String> {
    let states = [("before", &machine.before), ("after", &machine.after)];
    let told = states.into_iter().filter_map(|(when, state)| {
        let State { sm_mhz, memory_mhz, celsius, watts, limit_watts, throttle, processes } =
            state.as_ref()?;
        let parts = [
            sm_mhz.map(|mhz| format!("SM {mhz} MHz")),
            memory_mhz.map(|mhz| format!("memory {mhz} MHz")),
            celsius.map(|degrees| format!("{degrees} °C")),
            watts.map(|watts| match limit_watts {
                Some(limit) => format!("{watts:.0} of {limit:.0} W"),
                None => format!("{watts:.0} W"),
            }),
            throttle.as_ref().map(|reasons| match reasons.is_empty() {
                true => "not throttled".into(),
                false => format!("throttled by {}", reasons.join(" and ")),
            }),
            processes.as_ref().map(|others| match others.len() {
                0 => "no other process".into(),
                1 => "1 other process".into(),
                many => format!("{many} other processes"),
            }),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| format!("{when}: {}", parts.join(", ")))
    });
    let told: Vec<String> = told.collect();
    (!told.is_empty()).then(|| told.join("; "))
}

#[cfg(test)]
#[path = "../../../tests/support/library.rs"]
mod library;

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::record::{Model, Record};
    use crate::show;
    use dflash::gpu::emulator::Emulator;
    use dflash::gpu::memory::Overhead;
    use std::ffi::OsStr;

    const NVML: &str = include_str!("../../../tests/data/profile/nvml.c");

    /// The instruments of the card there, by a library that stands in for NVML.
    pub fn instruments(pci: &str) -> Instruments {
        let folder = tempfile::tempdir().unwrap();
        let own = format!("-DOWN={}", std::process::id());
        let library = library::library(folder.path(), "nvml.so", NVML, &[&own]);
        let nvml = Nvml::builder().lib_path(library.as_os_str()).init().unwrap();
        Instruments::with(Some((nvml, pci.into())))
    }

    fn emulator() -> DeviceHandle {
        DeviceHandle { name: "emulator", device: Box::new(Emulator::new()), overhead: Overhead::NONE }
    }

    #[test]
    fn a_card_is_found_by_its_place_on_the_bus() {
        let state = instruments("0000:65:00.0").state().unwrap();
        let process = |pid, bytes| Process { pid, bytes };
        let expected = State {
            sm_mhz: Some(1755),
            memory_mhz: Some(3201),
            celsius: Some(61),
            watts: Some(523.25),
            limit_watts: Some(700.0),
            throttle: Some(vec![]),
            processes: Some(vec![process(1000001, Some(3 << 30)), process(1000002, None)]),
        };
        assert_eq!(state, expected);
        assert_eq!(instruments("0000:17:00.0").state().unwrap().sm_mhz, Some(345));
        let unknown = instruments("0000:99:00.0");
        assert_eq!((unknown.state(), unknown.is_throttled()), (None, None));
    }

    #[test]
    fn idleness_and_set_clocks_are_no_throttling_and_all_else_is() {
        assert_eq!(instruments("0000:17:00.0").is_throttled(), Some(false), "idle");
        assert_eq!(instruments("0000:65:00.0").is_throttled(), Some(false), "set clocks, display clocks");
        let slow = instruments("0000:ca:00.0");
        assert_eq!(slow.is_throttled(), Some(true));
        let reasons: Vec<String> = HINDRANCES.iter().map(|(_, name)| name.to_string()).collect();
        assert_eq!(slow.state().unwrap().throttle, Some(reasons));
        for (i, (_, name)) in HINDRANCES.iter().enumerate() {
            let one = instruments(&format!("0000:c{i}:00.0"));
            assert_eq!(one.is_throttled(), Some(true), "{name}");
            assert_eq!(one.state().unwrap().throttle, Some(vec![name.to_string()]));
        }
    }

    #[test]
    fn what_a_card_does_not_answer_is_unknown() {
        let silent = instruments("0000:e1:00.0");
        assert_eq!(silent.state(), Some(State::default()));
        assert_eq!(silent.is_throttled(), None);
        let record = Record::new("kernels", silent.machine(&emulator()), Model::default());
        let schema = serde_json::from_str(include_str!("../../../benches/schema.json")).unwrap();
        assert!(jsonschema::is_valid(&schema, &serde_json::json!(record)), "{record:?}");
    }

    #[test]
    fn a_machine_tells_its_driver_and_its_state_before_and_after() {
        let mut place = emulator();
        place.name = "cuda";
        let machine = instruments("0000:65:00.0").machine(&place);
        assert_eq!(machine.driver.as_deref(), Some("580.95.05, CUDA 0.0"));
        assert_eq!(machine.before.as_ref().unwrap().sm_mhz, Some(1755));
        assert_eq!((machine.memory_gigabytes, machine.l2_bytes), (Some(17.179869184), Some(52428800)));
        assert_eq!((machine.capability.as_deref(), machine.multiprocessors), (Some("8.0"), Some(1)));
        assert_eq!(machine.ptx.as_deref(), Some("compute_90a"), "launches overlap there");
        let said = "SM 1755 MHz, memory 3201 MHz, 61 °C, 523 of 700 W, not throttled, 2 other processes";
        assert_eq!(describe(&machine), Some(format!("before: {said}; after: {said}")));
        // And in the record and its table.
        let record = Record::new("kernels", machine.clone(), Model::default());
        let schema = serde_json::from_str(include_str!("../../../benches/schema.json")).unwrap();
        let schema = jsonschema::validator_for(&schema).unwrap();
        assert_eq!(schema.validate(&serde_json::json!(record)).map_err(|e| e.to_string()), Ok(()));
        let table = show::text(&record, "Title", show::Format::Table);
        assert!(table.starts_with("Title\nbefore: SM 1755 MHz"), "{table}");
        // What nobody told is not said.
        let with = |state| describe(&Machine { after: Some(state), ..Machine::default() });
        assert_eq!(with(State::default()), None);
        let throttle = Some(vec!["power cap".into(), "thermal slowdown".into()]);
        let hot = State { watts: Some(699.6), throttle, processes: Some(vec![]), ..State::default() };
        let said = "after: 700 W, throttled by power cap and thermal slowdown, no other process";
        assert_eq!(with(hot).as_deref(), Some(said));
    }

    #[test]
    fn without_instruments_nothing_is_known() {
        assert!(Nvml::builder().lib_path(OsStr::new("/none/libnvidia-ml.so.1")).init().is_err());
        let place = emulator();
        assert_eq!(place.device.properties().pci, None);
        let none = Instruments::open(&place);
        assert_eq!((none.state(), none.is_throttled()), (None, None));
        let machine = none.machine(&place);
        assert_eq!((describe(&machine), machine.driver, machine.before), (None, None, None));
    }
}
