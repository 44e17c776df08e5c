//! The power calls a guest makes to its firmware (Arm DEN0022, PSCI 1.0), for hypervisors that leave
//! them to us.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Entry;

/// What a call asks for, by its function identifier and arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Which PSCI this is.
    Version,
    /// Whether there is a function.
    Features {
        /// Its identifier.
        function: u32,
    },
    /// The caller waits for an interrupt, or returns at once.
    CpuSuspend,
    /// The caller switches itself off.
    CpuOff,
    /// Another processor is switched on.
    CpuOn {
        /// Its affinity.
        target: u64,
        /// Its first instruction.
        entry: u64,
        /// What it finds in X0.
        context: u64,
    },
    /// Whether a processor is on.
    AffinityInfo {
        /// Its affinity.
        target: u64,
        /// 0 for a processor, more for groups of them.
        level: u64,
    },
    /// Whether a trusted OS has to be moved.
    MigrateInfoType,
    /// The machine switches off.
    SystemOff,
    /// The machine starts anew.
    SystemReset,
    /// Nothing of this.
    Unknown {
        /// The identifier.
        function: u32,
    },
}

/// Bit 30 of an identifier: arguments have 64 bits.
const WIDE: u32 = 1 << 30;
const BASE: u32 = 0x8400_0000;

impl Call {
    /// What the call with `x0` to `x3` asks for.
    pub fn decode([function, first, second, third]: [u64; 4]) -> Self {
        // The upper half of X0 is not the caller's to use (SMCCC 2.2).
        let function = function as u32;
        let wide = function & WIDE != 0;
        let argument = |value: u64| if wide { value } else { value & 0xffff_ffff };
        match (function & !WIDE).wrapping_sub(BASE) {
            0x0 if !wide => Self::Version,
            0x1 => Self::CpuSuspend,
            0x2 if !wide => Self::CpuOff,
            0x3 => Self::CpuOn {
                target: argument(first),
                entry: argument(second),
                context: argument(third),
            },
            0x4 => Self::AffinityInfo {
                target: argument(first),
                level: argument(second),
            },
            0x6 if !wide => Self::MigrateInfoType,
            0x8 if !wide => Self::SystemOff,
            0x9 if !wide => Self::SystemReset,
            0xa if !wide => Self::Features {
                function: first as u32,
            },
            _ => Self::Unknown { function },
        }
    }
}

/// What follows from a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest goes on with this in X0.
    Return(u64),
    /// The caller is off; [`Processors::wait`] tells when it goes on.
    Off,
    /// The machine is to be switched off.
    SystemOff,
    /// The machine is to be reset.
    SystemReset,
}

/// PSCI 1.0.
const VERSION: u64 = 0x1_0000;
const SUCCESS: i64 = 0;
const NOT_SUPPORTED: i64 = -1;
const INVALID_PARAMETERS: i64 = -2;
const DENIED: i64 = -3;
const ALREADY_ON: i64 = -4;
const ON_PENDING: i64 = -5;
/// There is no trusted OS.
const NO_MIGRATION: i64 = 2;
const INFO_ON: i64 = 0;
const INFO_OFF: i64 = 1;
const INFO_ON_PENDING: i64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Power {
    Off,
    /// Switched on, and not awake yet.
    Pending(Entry),
    On,
}

#[derive(Debug)]
struct Processor {
    affinity: u64,
    power: Power,
    kicked: bool,
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awake {
    /// The processor was on all the time.
    On,
    /// It was switched on, and starts here.
    Started(Entry),
    /// It is off, and was kicked.
    Kicked,
}

/// Which processors of a machine are on. Each is known here by its place in the list.
#[derive(Debug, Default)]
pub struct Processors {
    list: Mutex<Vec<Processor>>,
    changed: Condvar,
}

impl Processors {
    fn lock(&self) -> MutexGuard<'_, Vec<Processor>> {
        // Each change is one assignment.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a processor that is off; answers its place.
    pub fn add(&self, affinity: u64) -> usize {
        let mut list = self.lock();
        list.push(Processor {
            affinity,
            power: Power::Off,
            kicked: false,
        });
        list.len() - 1
    }

    /// Notes that a processor is on, as the first one is from the beginning.
    pub fn set_on(&self, place: usize) {
        if let Some(processor) = self.lock().get_mut(place) {
            processor.power = Power::On;
        }
    }

    /// Whether a processor is on.
    pub fn is_on(&self, place: usize) -> bool {
        let list = self.lock();
        list.get(place)
            .is_some_and(|processor| processor.power == Power::On)
    }

    /// Ends the wait of a processor that is off, or the next one.
    pub fn kick(&self, place: usize) {
        if let Some(processor) = self.lock().get_mut(place) {
            processor.kicked = true;
        }
        self.changed.notify_all();
    }

    /// Waits until a processor is on or kicked.
    pub fn wait(&self, place: usize) -> Awake {
        let mut list = self.lock();
        loop {
            let Some(processor) = list.get_mut(place) else {
                return Awake::On;
            };
            match processor.power {
                Power::On => {
                    processor.kicked = false;
                    return Awake::On;
                }
                _ if std::mem::take(&mut processor.kicked) => return Awake::Kicked,
                Power::Pending(entry) => {
                    processor.power = Power::On;
                    return Awake::Started(entry);
                }
                Power::Off => {}
            }
            list = self
                .changed
                .wait(list)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Carries out a call of the processor at `place`.
    pub fn call(&self, place: usize, call: Call) -> Outcome {
        let answer = match call {
            Call::Version => return Outcome::Return(VERSION),
            Call::SystemOff => return Outcome::SystemOff,
            Call::SystemReset => return Outcome::SystemReset,
            Call::CpuOff => return self.switch_off(place),
            // An implementation may come back at once (5.4.5); idle guests use WFI.
            Call::CpuSuspend => SUCCESS,
            Call::CpuOn {
                target,
                entry,
                context,
            } => self.switch_on(
                target,
                Entry {
                    pc: entry,
                    x0: context,
                },
            ),
            Call::AffinityInfo { target, level } => self.info(target, level),
            Call::MigrateInfoType => NO_MIGRATION,
            Call::Features { function } => features(function),
            Call::Unknown { .. } => NOT_SUPPORTED,
        };
        Outcome::Return(answer.cast_unsigned())
    }

    fn switch_off(&self, place: usize) -> Outcome {
        match self.lock().get_mut(place) {
            Some(processor) => {
                processor.power = Power::Off;
                Outcome::Off
            }
            None => Outcome::Return(DENIED.cast_unsigned()),
        }
    }

    fn switch_on(&self, target: u64, entry: Entry) -> i64 {
        let mut list = self.lock();
        let Some(processor) = list.iter_mut().find(|one| one.affinity == target) else {
            return INVALID_PARAMETERS;
        };
        match processor.power {
            Power::On => ALREADY_ON,
            Power::Pending(_) => ON_PENDING,
            Power::Off => {
                processor.power = Power::Pending(entry);
                self.changed.notify_all();
                SUCCESS
            }
        }
    }

    fn info(&self, target: u64, level: u64) -> i64 {
        if level != 0 {
            return INVALID_PARAMETERS;
        }
        let list = self.lock();
        match list.iter().find(|one| one.affinity == target) {
            None => INVALID_PARAMETERS,
            Some(processor) => match processor.power {
                Power::On => INFO_ON,
                Power::Off => INFO_OFF,
                Power::Pending(_) => INFO_ON_PENDING,
            },
        }
    }
}

/// Whether a function is there.
fn features(function: u32) -> i64 {
    match Call::decode([u64::from(function), 0, 0, 0]) {
        Call::Unknown { .. } => NOT_SUPPORTED,
        _ => SUCCESS,
    }
}
