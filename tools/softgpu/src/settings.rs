//! What a user chooses through environment variables. The README has the table.

use crate::card::{CARDS, Card};
use crate::machine::{Options, Sums, Vectors};
use std::borrow::Cow;
use std::path::PathBuf;
use std::{fs, io};

/// The CUDA version of the driver unless `SOFTGPU_DRIVER_VERSION` says otherwise: 13.0.
const DRIVER_VERSION: i32 = 13000;

/// The settings of a process.
pub struct Settings {
    /// The card that is simulated, with the memory that was chosen.
    pub card: Card,
    /// The CUDA version of the driver: 1000 times the major plus 10 times the minor version.
    pub driver_version: i32,
    /// The number of GPUs at the start.
    pub devices: i32,
    /// The driver function that fails, and the number of its first call that does, counted from 1.
    pub fail: Option<(String, u64)>,
    /// The file that gets the counters as JSON when the process exits.
    pub report: Option<PathBuf>,
    /// The folder from which modules are taken, or to which they are written: see [`Settings::replaced`].
    pub ptx: Option<PathBuf>,
    /// How kernels are executed.
    pub options: Options,
}

impl Settings {
    /// The settings of this process's environment.
    ///
    /// # Errors
    /// A sentence about a variable that has no meaning.
    pub fn from_env() -> Result<Settings, String> {
        let text = |name: &str| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty());
            value.map(|value| value.to_string_lossy().into_owned())
        };
        let number = |name: &str| text(name).map(|value| parse(name, &value)).transpose();
        let card = text("SOFTGPU_CARD").unwrap_or_else(|| Card::DEFAULT.to_string());
        let mut card = *find_card(&card).map_err(|e| format!("SOFTGPU_CARD={card}: {e}"))?;
        if let Some(bytes) = number("SOFTGPU_MEMORY")? {
            card.memory = bytes;
        }
        let devices = text("SOFTGPU_DEVICES").map_or(Ok(1), |value| device_count(&value))?;
        let mut options = Options::default();
        for (variable, option) in OPTIONS {
            if let Some(value) = text(variable) {
                set_option(&mut options, option, &value)?;
            }
        }
        Ok(Settings {
            card,
            driver_version: number("SOFTGPU_DRIVER_VERSION")?
                .map_or(DRIVER_VERSION, |version| version as i32),
            devices,
            fail: text("SOFTGPU_FAIL").map(|value| failure(&value)).transpose()?,
            report: text("SOFTGPU_REPORT").map(PathBuf::from),
            ptx: text("SOFTGPU_PTX").map(PathBuf::from),
            options,
        })
    }

    /// The PTX to load in place of a module's: that of the file `KERNEL.ptx` in the folder of `SOFTGPU_PTX`, where
    /// KERNEL is the module's first kernel. If there is no such file, the module is written there. Without the
    /// variable, and for a module without kernels, it is the module's.
    ///
    /// # Errors
    /// A sentence about a file that can be neither read nor written.
    pub fn replaced<'a>(&self, text: &'a str) -> Result<Cow<'a, str>, String> {
        let mut words = text.split_once(".entry").into_iter().flat_map(|(_, rest)| rest.split(['(', '{']));
        let (Some(folder), Some(kernel)) = (&self.ptx, words.next()) else { return Ok(Cow::Borrowed(text)) };
        let file = folder.join(format!("{}.ptx", kernel.trim()));
        let wrong = |e: io::Error| format!("SOFTGPU_PTX: {}: {e}", file.display());
        if !file.exists() {
            fs::write(&file, text).map_err(wrong)?;
            return Ok(Cow::Borrowed(text));
        }
        fs::read_to_string(&file).map(Cow::Owned).map_err(wrong)
    }
}

/// The card with this name.
///
/// # Errors
/// A sentence with the names that exist.
pub fn find_card(name: &str) -> Result<&'static Card, String> {
    let names = || CARDS.iter().map(|card| card.name).collect::<Vec<_>>().join(", ");
    Card::find(name).ok_or_else(|| format!("no card has this name, expected one of {}", names()))
}

/// The variables that set an option of the machine, and its name in [`set_option`].
const OPTIONS: [(&str, &str); 5] = [
    ("SOFTGPU_SCHEDULE", "schedule"),
    ("SOFTGPU_SUMS", "sums"),
    ("SOFTGPU_PERTURB", "perturb"),
    ("SOFTGPU_RACES", "races"),
    ("SOFTGPU_VECTORS", "vectors"),
];

/// Sets an option of the machine by name.
///
/// # Errors
/// A sentence about an unknown name or value.
pub fn set_option(options: &mut Options, name: &str, value: &str) -> Result<(), String> {
    match name {
        "schedule" => options.schedule = parse(name, value)?,
        "perturb" => options.perturb = parse::<u8>(name, value)? != 0,
        "races" => options.checks.races = parse::<u8>(name, value)? != 0,
        "sums" => {
            options.sums = match value {
                "ascending" => Sums::Ascending,
                "pairwise" => Sums::Pairwise,
                "aligned" => Sums::Aligned,
                _ => return Err(format!("{name}={value}: expected ascending, pairwise or aligned")),
            }
        }
        "vectors" => {
            options.vectors = match value {
                "base" => Vectors::Base,
                "avx2" => Vectors::Avx2,
                "avx512" => Vectors::Avx512,
                _ => return Err(format!("{name}={value}: expected base, avx2 or avx512")),
            }
        }
        _ => {
            return Err(format!(
                "{name}: no such option, expected schedule, sums, perturb, races or vectors"
            ));
        }
    }
    Ok(())
}

/// The number of GPUs in a text.
///
/// # Errors
/// A sentence if it is not 0 to 16.
pub fn device_count(value: &str) -> Result<i32, String> {
    let devices = parse("devices", value)?;
    if (0..=16).contains(&devices) {
        Ok(devices)
    } else {
        Err(format!("devices={devices}: expected 0 to 16"))
    }
}

/// The function and the call in `FUNCTION:N`.
fn failure(value: &str) -> Result<(String, u64), String> {
    let parts = value.split_once(':').and_then(|(name, call)| Some((name.to_string(), call.parse().ok()?)));
    parts.ok_or_else(|| format!("SOFTGPU_FAIL={value}: expected FUNCTION:N, as cuMemAlloc_v2:3"))
}

fn parse<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{name}={value}: expected a number"))
}
