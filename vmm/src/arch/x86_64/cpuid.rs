//! What each vCPU says it is: the hypervisor's supported CPUID with this VM's topology in it.

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX asked for.
    pub function: u32,
    /// ECX asked for, where it matters.
    pub index: u32,
    /// Whether ECX matters.
    pub indexed: bool,
    /// Answer in EAX.
    pub eax: u32,
    /// Answer in EBX.
    pub ebx: u32,
    /// Answer in ECX.
    pub ecx: u32,
    /// Answer in EDX.
    pub edx: u32,
}

/// Leaf 1, ECX: the timer's deadline is a TSC value; KVM has it but does not list it.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: several logical processors in the package.
const HTT: u32 = 1 << 28;
/// Leaf 7, ECX and EDX: control-flow enforcement.
const CET_SHADOW_STACK: u32 = 1 << 7;
const CET_BRANCH_TRACKING: u32 = 1 << 20;
/// Leaf 0x8000_0001, ECX: AMD's cache topology leaf, and its extended performance counters.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const PERFORMANCE_COUNTERS: u32 = 0b11 << 23;
/// Leaf 0x4000_0001, EAX: pages the host has yet to fetch are told to the guest, which does something
/// else meanwhile (Linux, virt/kvm/x86/cpuid.rst: KVM_FEATURE_ASYNC_PF, _VMEXIT and _INT).
const ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;
/// Level types of leaves 0xb and 0x1f (Intel SDM 3, "Detecting hardware multi-threading").
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The CPUID of vCPU `index` of `count`: one package, each vCPU a core of its own, APIC id = index.
pub(crate) fn for_vcpu(
    supported: &[Leaf],
    tsc_deadline: bool,
    index: u32,
    count: u32,
) -> Vec<Leaf> {
    let core_bits = bits_for(count);
    let mut leaves: Vec<Leaf> = supported
        .iter()
        // Topology is answered from here on, whatever the host's own looks like.
        .filter(|leaf| !matches!(leaf.function, 0xb | 0x1f))
        .copied()
        .collect();
    for leaf in &mut leaves {
        match leaf.function {
            1 => {
                leaf.ebx = (leaf.ebx & 0xffff) | (count.min(255) << 16) | (index << 24);
                leaf.ecx |= HYPERVISOR;
                if tsc_deadline {
                    leaf.ecx |= TSC_DEADLINE;
                }
                leaf.edx = if count > 1 {
                    leaf.edx | HTT
                } else {
                    leaf.edx & !HTT
                };
            }
            // Intel's caches: the last level is everybody's, the others a core's.
            4 if leaf.eax & 0x1f != 0 => {
                let level = (leaf.eax >> 5) & 7;
                let sharing = if level >= 3 { (1 << core_bits) - 1 } else { 0 };
                let cores = ((1 << core_bits) - 1) & 0x3f;
                leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14) | (cores << 26);
            }
            // No thermal sensors, no power management.
            6 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & (1 << 2), 0, 0, 0),
            // Their state is in no snapshot yet.
            7 if leaf.index == 0 => {
                leaf.ecx &= !CET_SHADOW_STACK;
                leaf.edx &= !CET_BRANCH_TRACKING;
            }
            // No performance counters: a container has no use for the host's, and probing costs boot
            // time.
            0xa => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
            // Some hosts' KVM then lets no vCPU of AMD's rest, and each restore begins with an interrupt
            // that wakes nobody.
            0x4000_0001 => leaf.eax &= !ASYNC_PAGE_FAULTS,
            0x8000_0001 => leaf.ecx &= !PERFORMANCE_COUNTERS,
            0x8000_0008 => leaf.ecx = (core_bits << 12) | (count - 1).min(255),
            // AMD's caches.
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let level = (leaf.eax >> 5) & 7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14);
            }
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
    }
    let extensions = leaves
        .iter()
        .any(|l| l.function == 0x8000_0001 && l.ecx & TOPOLOGY_EXTENSIONS != 0);
    if !extensions {
        leaves.retain(|leaf| !matches!(leaf.function, 0x8000_001d | 0x8000_001e));
    }
    let highest = leaves
        .iter()
        .find(|leaf| leaf.function == 0)
        .map_or(0, |leaf| leaf.eax);
    for function in [0xb, 0x1f] {
        if highest >= function {
            leaves.extend(topology(function, core_bits, index, count));
        }
    }
    leaves
}

/// Leaves 0xb and 0x1f: one thread in a core, all cores in one package.
fn topology(function: u32, core_bits: u32, index: u32, count: u32) -> [Leaf; 3] {
    let level = |number: u32, kind: u32, shift: u32, below: u32| Leaf {
        function,
        index: number,
        indexed: true,
        eax: shift,
        ebx: below,
        ecx: (kind << 8) | number,
        edx: index,
    };
    [
        level(0, LEVEL_SMT, 0, 1),
        level(1, LEVEL_CORE, core_bits, count),
        level(2, 0, 0, 0),
    ]
}

/// Bits of an APIC id that number the cores.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}
