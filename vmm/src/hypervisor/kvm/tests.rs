//! Each way the host's KVM can be missing, and what the guests of the architectures' tests share.

use std::fs::File;

use super::*;

/// Assembles a guest and makes a function that answers its bytes. Its
/// start may hold anything that has to be aligned to 2 KiB.
macro_rules! guest {
    ($vis:vis $name:ident, $($line:literal),+ $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata.guests",
            ".balign 2048",
            // Another object file may be the one that refers to it.
            concat!(".globl vmm_guest_", stringify!($name)),
            concat!(".globl vmm_guest_", stringify!($name), "_end"),
            concat!("vmm_guest_", stringify!($name), ":"),
            $($line,)+
            concat!("vmm_guest_", stringify!($name), "_end:"),
            ".popsection",
        );

        $vis fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("vmm_guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("vmm_guest_", stringify!($name), "_end")]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both symbols are of this binary's read-only data, one after the other.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

mod fixture;
mod guests;

pub(super) use fixture::{Fixture, travelled};

#[test]
fn a_host_without_kvm_says_so() {
    let error = Kvm::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
    assert!(matches!(error, HypervisorError::Absent { .. }));
    assert!(error.to_string().contains("/nonexistent/kvm"), "{error}");
}

#[test]
fn a_file_that_is_not_kvm_is_not_taken_for_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Kvm::open_at(file.path()).unwrap_err();
    assert!(
        matches!(error, HypervisorError::ApiVersion { found: -1, .. }),
        "{error}"
    );
}

#[test]
fn what_open_answers_is_told_apart() {
    let error = |number| open_error(Path::new(DEVICE), io::Error::from_raw_os_error(number));
    assert!(matches!(
        error(libc::ENOENT),
        HypervisorError::Absent { .. }
    ));
    assert!(matches!(
        error(libc::ENODEV),
        HypervisorError::Absent { .. }
    ));
    assert!(matches!(
        error(libc::EACCES),
        HypervisorError::Forbidden { .. }
    ));
    assert!(matches!(
        error(libc::EPERM),
        HypervisorError::Forbidden { .. }
    ));
    assert!(matches!(error(libc::EMFILE), HypervisorError::Open { .. }));
}

#[test]
fn a_forbidden_device_is_forbidden() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kvm");
    File::create(&path).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    std::fs::set_permissions(&path, mode).unwrap();
    match Kvm::open_at(&path).unwrap_err() {
        HypervisorError::Forbidden { .. } => {}
        // As root: the file opens and is not KVM.
        HypervisorError::ApiVersion { .. } => eprintln!("skipped: root may open anything"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_missing_capability_is_named() {
    assert!(check_capabilities(|_| true).is_ok());
    let error = check_capabilities(|capability| capability as u32 != Cap::Irqfd as u32);
    let error = error.unwrap_err();
    assert!(matches!(
        error,
        HypervisorError::Lacks {
            capability: "KVM_CAP_IRQFD"
        }
    ));
    assert_eq!(error.to_string(), "KVM of this host lacks KVM_CAP_IRQFD");
}
