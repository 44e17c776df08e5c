use libcontainer::oci_spec::runtime::ProcessBuilder;

use super::*;

fn lookup(arg: &str, path: &str) -> Result<PathBuf, String> {
    let process = ProcessBuilder::default()
        .args([arg.to_owned()])
        .env([format!("PATH={path}")])
        .build()
        .unwrap();
    find(&process)
}

#[test]
fn a_name_is_looked_for_in_path() {
    let found = lookup("sh", "/nonexistent:/bin").unwrap();
    assert_eq!(found, Path::new("/bin/sh"));
}

#[test]
fn errors_are_worded_as_runc_words_them() {
    assert_eq!(
        lookup("nosuch", "/bin").unwrap_err(),
        "exec: \"nosuch\": executable file not found in $PATH"
    );
    assert_eq!(
        lookup("/nosuch", "/bin").unwrap_err(),
        "exec: \"/nosuch\": stat /nosuch: no such file or directory"
    );
    assert_eq!(
        lookup("/etc/passwd/x", "/bin").unwrap_err(),
        "exec: \"/etc/passwd/x\": stat /etc/passwd/x: not a directory"
    );
    assert_eq!(
        lookup("/etc/passwd", "/bin").unwrap_err(),
        "exec: \"/etc/passwd\": permission denied"
    );
    assert_eq!(
        lookup("/etc", "/bin").unwrap_err(),
        "exec: \"/etc\": is a directory"
    );
}

#[test]
fn an_empty_path_finds_nothing() {
    assert!(lookup("sh", "").is_err());
    assert!(lookup("", "/bin").is_err());
}
