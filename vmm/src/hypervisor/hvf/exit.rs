//! What an exception of the guest means: the syndrome register, field by field (Arm ARM, `ESR_EL2`).

use crate::arch::aarch64::register_name;

/// Bytes of an instruction.
pub(super) const INSTRUCTION: u64 = 4;

/// An exception that came to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trap {
    /// WFI or WFE that the kernel did not keep.
    Wait,
    /// HVC: the program counter is past it already.
    Hypercall,
    /// SMC.
    SecureCall,
    /// MRS or MSR.
    SystemRegister(SystemRegister),
    /// A load or store where no memory is mapped.
    Data(Access),
    /// A load or store whose syndrome does not say what it does.
    Opaque,
    /// Cache maintenance by address where no memory is mapped: nothing to do.
    Maintenance,
    /// An instruction was fetched where no memory is mapped.
    Fetch,
    /// Anything else, by its class.
    Other(u64),
}

/// A load or a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) write: bool,
    /// 1, 2, 4 or 8 bytes.
    pub(super) size: usize,
    /// The general register; 31 is none.
    pub(super) register: usize,
    /// The register's whole width is written, not its lower half.
    pub(super) wide: bool,
    /// The value's sign fills the register.
    pub(super) signed: bool,
}

/// An access to a system register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SystemRegister {
    pub(super) write: bool,
    pub(super) register: usize,
    /// Op0, op1, CRn, CRm and op2, as an instruction has them.
    pub(super) encoding: u32,
}

impl Trap {
    /// What a syndrome means.
    pub(super) fn decode(syndrome: u64) -> Self {
        let bit = |at: u32| syndrome >> at & 1 == 1;
        let field = |at: u32, width: u32| (syndrome >> at & ((1 << width) - 1)) as usize;
        match field(26, 6) as u64 {
            0x01 => Self::Wait,
            0x16 => Self::Hypercall,
            0x17 => Self::SecureCall,
            0x18 => Self::SystemRegister(SystemRegister {
                write: !bit(0),
                register: field(5, 5),
                encoding: (syndrome as u32 >> 20 & 3) << 14
                    | (syndrome as u32 >> 14 & 7) << 11
                    | (syndrome as u32 >> 10 & 0xf) << 7
                    | (syndrome as u32 >> 1 & 0xf) << 3
                    | (syndrome as u32 >> 17 & 7),
            }),
            0x20 => Self::Fetch,
            0x24 if bit(8) => Self::Maintenance,
            0x24 if !bit(24) => Self::Opaque,
            0x24 => Self::Data(Access {
                write: bit(6),
                size: 1 << field(22, 2),
                register: field(16, 5),
                wide: bit(15),
                signed: bit(21),
            }),
            other => Self::Other(other),
        }
    }
}

/// Whether a syndrome is of an access, or a fetch, where nothing was mapped: a translation fault.
pub(super) fn is_untranslated(syndrome: u64) -> bool {
    matches!(syndrome >> 26 & 0x3f, 0x20 | 0x24) && syndrome & 0x3c == 0x04
}

impl Access {
    /// What a load leaves in its register.
    pub(super) fn extend(self, bytes: [u8; 8]) -> u64 {
        let raw = u64::from_le_bytes(bytes);
        let unused = 64 - 8 * self.size as u32;
        let value = if self.signed {
            ((raw << unused).cast_signed() >> unused).cast_unsigned()
        } else {
            raw << unused >> unused
        };
        if self.wide {
            value
        } else {
            value & 0xffff_ffff
        }
    }
}

impl SystemRegister {
    /// `S3_0_C12_C12_5`, as an assembler takes it.
    pub(super) fn name(self) -> String {
        register_name(self.encoding)
    }
}
