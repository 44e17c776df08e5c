use std::path::Path;
use std::time::Duration;

use expect_test::{expect, expect_file};
use proptest::prelude::*;

use super::*;

fn error_of(text: &str) -> String {
    parse(text, Path::new("/etc/supermachine/config.toml"))
        .expect_err("should be refused")
        .to_string()
}

#[test]
fn example_file_is_generated_from_the_types() {
    expect_file!["../../../config.toml.example"].assert_eq(&example());
}

#[test]
fn example_parses_to_the_defaults() {
    let parsed = parse(&example(), Path::new("example")).expect("example");
    assert_eq!(parsed.resolve(), Resolved::default());
}

#[test]
fn empty_file_is_all_defaults() {
    let parsed = parse("", Path::new("empty")).expect("empty");
    assert_eq!(parsed, Config::default());
    assert_eq!(parsed.resolve(), Resolved::default());
}

#[test]
fn written_values_win_and_the_rest_keeps_its_default() {
    let text = "[vm]\nmemory = \"1GiB\"\n\n[timeouts]\ncall = \"1500ms\"\n";
    let resolved = parse(text, Path::new("some")).expect("valid").resolve();
    assert_eq!(resolved.vm.memory, MemorySize(1 << 30));
    assert_eq!(resolved.vm.vcpus, Vcpus(1));
    assert_eq!(resolved.timeouts.call, Time(Duration::from_millis(1500)));
}

#[test]
fn resolved_configuration_reads_back() {
    let text = "[kernel]\nsha256 = \"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\"\ncmdline = \"a=\\\"b\\\"\"\n[log]\nlevel = \"debug\"\n";
    let resolved = parse(text, Path::new("some")).expect("valid").resolve();
    let again = parse(&resolved.to_toml(false), Path::new("again"))
        .expect("valid")
        .resolve();
    assert_eq!(again, resolved);
}

#[test]
fn unknown_key_names_file_line_key_and_the_known_ones() {
    expect!["/etc/supermachine/config.toml, line 4: vm.memroy is not a known key; expected one of `vcpus`, `memory`, `memory_overhead`, `program`, `allow_emulated_kvm`"].assert_eq(&error_of("# a comment\n[vm]\nvcpus = 2\nmemroy = \"1GiB\"\n"));
}

#[test]
fn a_layer_that_does_not_exist_names_those_that_do() {
    expect![[r#"/etc/supermachine/config.toml, line 2: jail.allow_missing is ["pid", "moat"]; expected an array of "ids", "user-namespace", "pid", "root", "network", "ipc", "landlock", "seccomp""#]].assert_eq(&error_of("[jail]\nallow_missing = [\"pid\", \"moat\"]\n"));
}

#[test]
fn unknown_section_is_refused() {
    expect!["/etc/supermachine/config.toml, line 1: virtual is not a known key; expected one of `kernel`, `vm`, `rootfs`, `changes`, `images`, `console`, `jail`, `timeouts`, `log`, `state`"].assert_eq(&error_of("[virtual]\nvcpus = 2\n"));
}

#[test]
fn wrong_type_names_the_value() {
    expect![[r#"/etc/supermachine/config.toml, line 2: vm.memory is 512; expected a whole number of MiB from 64MiB to 1TiB, such as "512MiB""#]].assert_eq(&error_of("[vm]\nmemory = 512\n"));
    expect![[r#"/etc/supermachine/config.toml, line 3: vm.vcpus is "two"; expected a number of vCPUs from 1 to 64"#]].assert_eq(&error_of("[vm]\n\nvcpus = \"two\"\n"));
    expect!["/etc/supermachine/config.toml, line 1: vm is 3; expected a table of settings"]
        .assert_eq(&error_of("vm = 3\n"));
    expect![[r#"/etc/supermachine/config.toml, line 1: kernel.path is 7; expected an absolute path, such as "/var/lib/supermachine""#]].assert_eq(&error_of("kernel = { path = 7 }\n"));
}

#[test]
fn value_out_of_range_names_the_range() {
    expect!["/etc/supermachine/config.toml, line 2: vm.vcpus is 0; expected a number of vCPUs from 1 to 64"].assert_eq(&error_of("[vm]\nvcpus = 0\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: vm.memory is "1MiB"; expected a whole number of MiB from 64MiB to 1TiB, such as "512MiB""#]].assert_eq(&error_of("[vm]\nmemory = \"1MiB\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: vm.memory is "lots"; expected a whole number of MiB from 64MiB to 1TiB, such as "512MiB""#]].assert_eq(&error_of("[vm]\nmemory = \"lots\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: images.budget is "99999999TiB"; expected a size with its unit, such as "512MiB" (B, KiB, MiB, GiB, TiB), at least 1MiB"#]].assert_eq(&error_of("[images]\nbudget = \"99999999TiB\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: timeouts.boot is "5 parsecs"; expected a time with its unit, such as "30s" (ms, s, m, h), from 1ms to 24h"#]].assert_eq(&error_of("[timeouts]\nboot = \"5 parsecs\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: log.level is "loud"; expected one of "off", "error", "warn", "info", "debug", "trace""#]].assert_eq(&error_of("[log]\nlevel = \"loud\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: state.directory is "run"; expected an absolute path, such as "/var/lib/supermachine""#]].assert_eq(&error_of("[state]\ndirectory = \"run\"\n"));
    expect![[r#"/etc/supermachine/config.toml, line 2: kernel.sha256 is "abc"; expected a SHA-256 digest: 64 hexadecimal digits"#]].assert_eq(&error_of("[kernel]\nsha256 = \"abc\"\n"));
}

#[test]
fn broken_toml_names_the_line() {
    expect!["/etc/supermachine/config.toml, line 3: not valid TOML: string values must be quoted, expected literal string"].assert_eq(&error_of("[vm]\nvcpus = 2\nmemory = \n"));
    expect!["/etc/supermachine/config.toml, line 3: not valid TOML: duplicate key"]
        .assert_eq(&error_of("[vm]\nvcpus = 2\nvcpus = 3\n"));
}

#[test]
fn a_named_file_must_exist() {
    let error = load(Some(Path::new("/nonexistent/config.toml"))).expect_err("missing");
    assert_eq!(
        error.to_string(),
        "Cannot read configuration file /nonexistent/config.toml"
    );
}

proptest! {
    #[test]
    fn sizes_print_as_they_parse(mib in 1u64..1 << 30) {
        let text = format!("[rootfs]\nwritable_size = \"{}\"\n", Size(mib << 20));
        let parsed = parse(&text, Path::new("size")).expect("valid");
        prop_assert_eq!(parsed.rootfs.writable_size, Some(Size(mib << 20)));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,80}|(\\[?[a-z_]{1,8}\\]? ?=? ?\"?[0-9a-zA-Z]{0,8}\"?\n){0,6}") {
        let _ = parse(&text, Path::new("any"));
    }
}
