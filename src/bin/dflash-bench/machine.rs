//! The machine of a run: the card, its instruments, and whether it was throttled.
//!
//! The instruments are NVML, which comes with the driver and is loaded at run time. A reading that NVML does
//! not give is null in the record and no error.

use crate::record::{Machine, Process, State};
use dflash::cli::device::{Choice, DeviceHandle};
use dflash::gpu::cuda::Cuda;
use dflash::gpu::device::Properties;
use dflash::gpu::ptx;
use dflash::{Error, Result};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;

/// Reasons that count as throttling. Idleness does not, nor do clocks set by the user, which make
/// measurements steadier.
const THROTTLING: [(ThrottleReasons, &str); 6] = [
    (ThrottleReasons::SW_POWER_CAP, "power cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hardware thermal slowdown"),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hardware power brake"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "thermal slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync boost"),
];

/// The device that `--device` comes to: for `auto` a GPU if one can run the kernels, else the CPU with the reason;
/// and whether it is the software GPU. Nothing is opened, so that flags can be checked first.
///
/// # Errors
/// [`Error::Usage`] if `--gpu` goes with a device that is no GPU.
pub fn settle(choice: Choice, gpu: Option<u32>) -> Result<Settled> {
    let number = gpu.unwrap_or(0);
    let software = || match ptx::targets().is_empty() {
        // Says why, before it looks for a GPU.
        true => Cuda::open(number).map(|_| false),
        false => Cuda::probe(number).map(|properties| properties.software),
    };
    let settled = |device, software, no_gpu| Ok(Settled { device, software, no_gpu });
    match choice {
        Choice::Cpu if gpu.is_some() => Err(Error::Usage("--gpu needs --device cuda or auto".into())),
        Choice::Cpu => settled(choice, false, None),
        // Opening it will say what is wrong.
        Choice::Cuda => settled(choice, software().unwrap_or(false), None),
        Choice::Auto => match software() {
            Ok(software) => settled(Choice::Cuda, software, None),
            Err(reason) => settled(Choice::Cpu, false, Some(reason)),
        },
    }
}

/// Where a measurement runs.
pub struct Settled {
    /// Not [`Choice::Auto`].
    pub device: Choice,
    pub software: bool,
    /// Why there is no GPU, if one was looked for.
    pub no_gpu: Option<Error>,
}

/// The instruments of a card, if it has any.
pub struct Instruments {
    /// NVML, and the card's PCI address: NVML and CUDA number cards differently.
    card: Option<(Nvml, String)>,
    before: Option<State>,
}

impl Instruments {
    /// The instruments of the device `handle`, with its present state. Without instruments every reading is
    /// None.
    pub fn open(handle: &DeviceHandle) -> Instruments {
        // NVML is loaded only for a card.
        let pci = handle.device.properties().pci.clone();
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

    /// Present clocks, power, temperature, throttling and processes.
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
            throttle: throttle_reasons(&device),
            processes,
        })
    }

    /// Whether the card is throttled now. Only a working card can be.
    pub fn is_throttled(&self) -> Option<bool> {
        Some(!throttle_reasons(&self.device()?)?.is_empty())
    }

    /// The machine of a record, to be called at the end of the run.
    pub fn machine(&self, handle: &DeviceHandle) -> Machine {
        let Properties { name, driver, capability, multiprocessors, l2, memory, overlap, .. } =
            handle.device.properties();
        let gpu = handle.name == "cuda";
        let version = self.card.as_ref().and_then(|(nvml, _)| nvml.sys_driver_version().ok());
        let cuda = format!("CUDA {}.{}", driver / 1000, driver % 1000 / 10);
        Machine {
            device: Some(handle.name.into()),
            card: Some(name.clone()),
            driver: gpu.then(|| version.map_or(cuda.clone(), |version| format!("{version}, {cuda}"))),
            memory_gigabytes: gpu.then_some(*memory as f64 / 1e9),
            capability: gpu.then(|| format!("{}.{}", capability.0, capability.1)),
            multiprocessors: gpu.then_some(*multiprocessors),
            l2_bytes: gpu.then_some(*l2),
            ptx: Some(if *overlap { "compute_90" } else { "compute_80" }.into()),
            before: self.before.clone(),
            after: self.state(),
            ..Machine::default()
        }
    }
}

fn throttle_reasons(device: &nvml_wrapper::Device) -> Option<Vec<String>> {
    let reasons = device.current_throttle_reasons().ok()?;
    let named = THROTTLING.iter().filter(|(reason, _)| reasons.contains(*reason));
    Some(named.map(|(_, name)| name.to_string()).collect())
}

#[cfg(test)]
#[path = "../../../tests/support/library.rs"]
mod library;

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::format::Format;
    use crate::record::{Model, Record};
    use crate::show;
    use crate::test_gpu::TestGpu;
    use std::ffi::OsStr;

    const NVML: &str = include_str!("../../../tests/data/profile/nvml.c");

    /// The instruments of the card at that address, through a substitute for NVML.
    pub fn instruments(pci: &str) -> Instruments {
        let folder = tempfile::tempdir().unwrap();
        let own = format!("-DOWN={}", std::process::id());
        let library = library::library(folder.path(), "nvml.so", NVML, &[&own]);
        let nvml = Nvml::builder().lib_path(library.as_os_str()).init().unwrap();
        Instruments::with(Some((nvml, pci.into())))
    }

    /// No instruments.
    pub fn none() -> Instruments {
        Instruments::with(None)
    }

    fn software_gpu() -> DeviceHandle {
        DeviceHandle::of(Box::new(TestGpu::new()))
    }

    #[test]
    fn a_card_is_found_by_its_pci_address() {
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
    fn only_idleness_and_set_clocks_are_not_throttling() {
        assert_eq!(instruments("0000:17:00.0").is_throttled(), Some(false), "idle");
        assert_eq!(instruments("0000:65:00.0").is_throttled(), Some(false), "set clocks, display clocks");
        let slow = instruments("0000:ca:00.0");
        assert_eq!(slow.is_throttled(), Some(true));
        let reasons: Vec<String> = THROTTLING.iter().map(|(_, name)| name.to_string()).collect();
        assert_eq!(slow.state().unwrap().throttle, Some(reasons));
        for (i, (_, name)) in THROTTLING.iter().enumerate() {
            let one = instruments(&format!("0000:c{i}:00.0"));
            assert_eq!(one.is_throttled(), Some(true), "{name}");
            assert_eq!(one.state().unwrap().throttle, Some(vec![name.to_string()]));
        }
    }

    #[test]
    fn readings_that_a_card_does_not_give_are_null() {
        let silent = instruments("0000:e1:00.0");
        assert_eq!(silent.state(), Some(State::default()));
        assert_eq!(silent.is_throttled(), None);
        let record = Record::new("kernels", silent.machine(&software_gpu()), Model::default());
        let schema = serde_json::from_str(include_str!("../../../benches/schema.json")).unwrap();
        assert!(jsonschema::is_valid(&schema, &serde_json::json!(record)), "{record:?}");
    }

    #[test]
    fn a_record_has_the_driver_and_the_state_before_and_after() {
        let mut handle = software_gpu();
        handle.name = "cuda";
        let machine = instruments("0000:65:00.0").machine(&handle);
        assert_eq!(machine.driver.as_deref(), Some("580.95.05, CUDA 13.0"));
        assert_eq!(machine.before.as_ref().unwrap().sm_mhz, Some(1755));
        assert_eq!((machine.memory_gigabytes, machine.l2_bytes), (Some(150.754820096), Some(52428800)));
        assert_eq!((machine.capability.as_deref(), machine.multiprocessors), (Some("9.0"), Some(132)));
        assert_eq!(machine.ptx.as_deref(), Some("compute_90"), "launches overlap there");
        let line = "SM 1755 MHz, memory 3201 MHz, 61 °C, 523 of 700 W, not throttled, 2 other processes";
        assert_eq!(machine.describe(), Some(format!("before: {line}; after: {line}")));
        // In the record and its table, too.
        let record = Record::new("kernels", machine.clone(), Model::default());
        let schema = serde_json::from_str(include_str!("../../../benches/schema.json")).unwrap();
        let schema = jsonschema::validator_for(&schema).unwrap();
        assert_eq!(schema.validate(&serde_json::json!(record)).map_err(|e| e.to_string()), Ok(()));
        let table = show::text(&record, "Title", Format::Table);
        assert!(table.starts_with("Title\nbefore: SM 1755 MHz"), "{table}");
        // Unknown readings are left out.
        let with = |state| Machine { after: Some(state), ..Machine::default() }.describe();
        assert_eq!(with(State::default()), None);
        let throttle = Some(vec!["power cap".into(), "thermal slowdown".into()]);
        let hot = State { watts: Some(699.6), throttle, processes: Some(vec![]), ..State::default() };
        let line = "after: 700 W, throttled by power cap and thermal slowdown, no other process";
        assert_eq!(with(hot).as_deref(), Some(line));
    }

    #[test]
    fn without_instruments_every_reading_is_null() {
        assert!(Nvml::builder().lib_path(OsStr::new("/none/libnvidia-ml.so.1")).init().is_err());
        let none = none();
        assert_eq!((none.state(), none.is_throttled()), (None, None));
        let machine = none.machine(&software_gpu());
        assert_eq!((machine.describe(), machine.driver, machine.before), (None, None, None));
    }
}
