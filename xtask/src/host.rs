//! What this host can do: whether its own KVM runs guest kernels.

use std::fs;
use std::path::Path;

/// Where microVMs can run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// The host's KVM runs guest kernels natively.
    Native,
    /// Only in the lab, for this reason.
    Lab(String),
}

/// Looks at the processor, /dev/kvm and the kind of KVM. `SUPERMACHINE_PLACE=lab` forces the lab.
pub(crate) fn place() -> Place {
    if std::env::var("SUPERMACHINE_PLACE").is_ok_and(|place| place == "lab") {
        return Place::Lab("SUPERMACHINE_PLACE asks for it".to_owned());
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match obstacle(
        &cpuinfo,
        Path::new("/sys/module/kvm_pvm").exists(),
        kvm_error(),
    ) {
        None => Place::Native,
        Some(reason) => Place::Lab(reason),
    }
}

fn kvm_error() -> Option<String> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .err()
        .map(|error| format!("/dev/kvm can't be opened: {error}"))
}

fn obstacle(cpuinfo: &str, pvm: bool, kvm: Option<String>) -> Option<String> {
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let native = flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    if let Some(error) = kvm {
        return Some(error);
    }
    if pvm {
        return Some("its KVM (kvm_pvm) emulates a guest kernel instruction by instruction".into());
    }
    (!native).then(|| "its processor shows neither vmx nor svm, so its KVM only emulates".into())
}

/// Says in one sentence where things will run, and why.
pub(crate) fn announce(place: &Place) {
    match place {
        Place::Native => {
            eprintln!("    This host's KVM runs guests natively: running on the host.")
        }
        Place::Lab(reason) => {
            eprintln!(
                "    This host can't run guest kernels natively ({reason}): running in the lab, a machine emulated by QEMU."
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::obstacle;

    #[test]
    fn only_a_processor_with_virtualization_and_an_open_kvm_is_native() {
        let (with, without) = ("flags\t\t: fpu svm\n", "flags\t\t: fpu sse\n");
        assert_eq!(obstacle(with, false, None), None);
        assert!(obstacle(without, false, None).is_some());
        assert!(obstacle(with, true, None).is_some());
        assert!(obstacle(with, false, Some("no".into())).is_some());
    }
}
