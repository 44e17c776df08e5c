//! The kinds of value a key can have, each checked where it is read so that a
//! bad one is reported with its place in the file.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer};
use supermachine_vmm::jail::{Layer, Policy, Seccomp};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// What the example file and error texts need to know of a value.
pub(super) trait Setting: Sized {
    /// The value as it is written in TOML; `None` if there is none.
    fn to_toml(&self) -> Option<String>;
    /// A value to show where the default is to have none.
    fn sample() -> &'static str {
        "\"\""
    }
}

/// Names a newtype that is written as a string and parsed by `FromStr`-like `parse`.
macro_rules! from_text {
    ($type:ident, $expected:expr, $parse:expr) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl de::Visitor<'_> for Text {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        let parse: fn(&str) -> Option<$type> = $parse;
                        parse(text)
                            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

/// Names a newtype over a bounded integer.
macro_rules! from_integer {
    ($type:ident, $inner:ty, $min:expr, $max:expr, $expected:expr) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Integer;
                impl de::Visitor<'_> for Integer {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_i64<E: de::Error>(self, value: i64) -> Result<$type, E> {
                        <$inner>::try_from(value)
                            .ok()
                            .filter(|v| ($min..=$max).contains(v))
                            .map($type)
                            .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(value), &self))
                    }
                }
                deserializer.deserialize_i64(Integer)
            }
        }

        impl Setting for $type {
            fn to_toml(&self) -> Option<String> {
                Some(self.0.to_string())
            }
        }
    };
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A whole number and a unit, as in `512MiB`.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// The shortest exact way to write `value` in one of `units`, which go from small to large.
fn unscaled(value: u64, units: &[(&str, u64)]) -> String {
    let (name, factor) = units
        .iter()
        .rev()
        .find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor))
        .copied()
        .unwrap_or(units[0]);
    format!("{}{name}", value / factor)
}

const SIZE_UNITS: [(&str, u64); 5] = [
    ("B", 1),
    ("KiB", KIB),
    ("MiB", MIB),
    ("GiB", GIB),
    ("TiB", TIB),
];
const TIME_UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// A number of bytes, written with its unit: `"8GiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

from_text!(
    Size,
    "a size with its unit, such as \"512MiB\" (B, KiB, MiB, GiB, TiB), at least 1MiB",
    |text| scaled(text, &SIZE_UNITS)
        .filter(|v| (MIB..=i64::MAX as u64).contains(v))
        .map(Size)
);

impl Setting for Size {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&unscaled(self.0, &SIZE_UNITS))
    }
}

/// The memory of a machine in bytes: enough for a kernel, whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(pub u64);

impl MemorySize {
    /// The least memory a machine gets: below this a guest kernel doesn't start.
    pub const MIN: u64 = 64 * MIB;
    /// The most: what the address layout has room for with ease.
    pub const MAX: u64 = TIB;
}

from_text!(
    MemorySize,
    "a whole number of MiB from 64MiB to 1TiB, such as \"512MiB\"",
    |text| scaled(text, &SIZE_UNITS)
        .filter(|v| (MemorySize::MIN..=MemorySize::MAX).contains(v) && v.is_multiple_of(MIB))
        .map(MemorySize)
);

impl Setting for MemorySize {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(&unscaled(self.0, &SIZE_UNITS)))
    }
}

/// A span of time, written with its unit: `"30s"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub Duration);

from_text!(
    Time,
    "a time with its unit, such as \"30s\" (ms, s, m, h), from 1ms to 24h",
    |text| scaled(text, &TIME_UNITS)
        .filter(|v| (1..=86_400_000).contains(v))
        .map(|v| Time(Duration::from_millis(v)))
);

impl Setting for Time {
    fn to_toml(&self) -> Option<String> {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        Some(quoted(&unscaled(millis, &TIME_UNITS)))
    }
}

/// An absolute path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

from_text!(
    AbsolutePath,
    "an absolute path, such as \"/var/lib/supermachine\"",
    |text| {
        (text.starts_with('/') && !text.contains('\0')).then(|| AbsolutePath(PathBuf::from(text)))
    }
);

impl Setting for AbsolutePath {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(&self.0.to_string_lossy()))
    }
}

/// A SHA-256 digest, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

from_text!(Digest, "a SHA-256 digest: 64 hexadecimal digits", |text| {
    let mut bytes = [0u8; 32];
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(Digest(bytes))
});

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

impl Setting for Digest {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(&self.to_string()))
    }
    fn sample() -> &'static str {
        "\"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\""
    }
}

/// A number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpus(pub u32);

impl Vcpus {
    /// The most vCPUs one machine gets.
    pub const MAX: u32 = 64;
}

from_integer!(Vcpus, u32, 1, Vcpus::MAX, "a number of vCPUs from 1 to 64");

/// A number of files, directories and other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries(pub u64);

from_integer!(
    Entries,
    u64,
    1000,
    1_000_000_000,
    "a number from 1000 to 1000000000"
);

/// A number of console ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports(pub u32);

impl Ports {
    /// The most: the console device has one more, which is the agent's.
    pub const MAX: u32 = 63;
}

from_integer!(Ports, u32, 4, Ports::MAX, "a number of ports from 4 to 63");

/// The least user id of a machine's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstId(pub u32);

// With room above for process ids, and below for users.
from_integer!(
    FirstId,
    u32,
    65_536,
    4_000_000_000,
    "an id from 65536 to 4000000000"
);

/// Layers of the confinement of a machine's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layers(pub Vec<Layer>);

impl Default for Layers {
    fn default() -> Self {
        Self(Policy::default().allow_missing)
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> de::Visitor<'de> for Names {
            type Value = Layers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "an array of {}",
                    Layer::ALL.map(|l| format!("{:?}", l.as_str())).join(", ")
                )
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut names: A) -> Result<Layers, A::Error> {
                let mut layers = Vec::new();
                while let Some(name) = names.next_element::<String>()? {
                    layers.push(Layer::parse(&name).ok_or_else(|| {
                        de::Error::invalid_value(de::Unexpected::Str(&name), &self)
                    })?);
                }
                Ok(Layers(layers))
            }
        }
        deserializer.deserialize_seq(Names)
    }
}

impl Setting for Layers {
    fn to_toml(&self) -> Option<String> {
        let names: Vec<_> = self.0.iter().map(|layer| quoted(layer.as_str())).collect();
        Some(format!("[{}]", names.join(", ")))
    }
}

/// What is done about a forbidden system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeccompMode(pub Seccomp);

from_text!(
    SeccompMode,
    "one of \"enforce\", \"log\", \"off\"",
    |text| Seccomp::parse(text).map(SeccompMode)
);

impl Setting for SeccompMode {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(self.0.as_str()))
    }
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Level {
    const NAMES: [(&'static str, Level); 6] = [
        ("off", Level::Off),
        ("error", Level::Error),
        ("warn", Level::Warn),
        ("info", Level::Info),
        ("debug", Level::Debug),
        ("trace", Level::Trace),
    ];

    /// The name it has in the file, in lower case.
    pub fn as_str(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, level)| *level == self)
            .map_or("off", |(name, _)| name)
    }
}

from_text!(
    Level,
    "one of \"off\", \"error\", \"warn\", \"info\", \"debug\", \"trace\"",
    |text| Level::NAMES
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, level)| *level)
);

impl Setting for Level {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(self.as_str()))
    }
}

impl Setting for bool {
    fn to_toml(&self) -> Option<String> {
        Some(self.to_string())
    }
}

impl Setting for String {
    fn to_toml(&self) -> Option<String> {
        Some(quoted(self))
    }
}

impl<T: Setting> Setting for Option<T> {
    fn to_toml(&self) -> Option<String> {
        self.as_ref().and_then(Setting::to_toml)
    }
    fn sample() -> &'static str {
        T::sample()
    }
}
