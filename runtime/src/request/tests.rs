use super::*;

#[test]
fn identifiers_are_what_containerd_accepts() {
    let longest = "a".repeat(76);
    for valid in ["a", "A9", "web-1", "k8s.io", "a_b.c-d", longest.as_str()] {
        assert_eq!(Id::new("Id", valid).expect(valid).as_str(), valid);
    }
    let too_long = "a".repeat(77);
    for invalid in [
        "",
        ".",
        "..",
        "-a",
        "a-",
        "a--b",
        "a/b",
        "../a",
        "a b",
        "a\0",
        "é",
        too_long.as_str(),
    ] {
        Id::new("Id", invalid).expect_err(invalid);
    }
}

#[test]
fn error_names_the_identifier() {
    let error = Id::new("Namespace", "../etc").expect_err("escape");
    assert!(
        error
            .to_string()
            .starts_with("Namespace \"../etc\" is not an identifier"),
        "{error}"
    );
}

#[test]
fn streams_are_paths_or_known_schemes() {
    let stdio = Stdio::new("", "/run/out", "file:///var/log/err", false).expect("valid");
    assert_eq!(stdio.stdin, Stream::None);
    assert_eq!(stdio.stdout, Stream::Fifo("/run/out".into()));
    assert_eq!(stdio.stderr, Stream::File("/var/log/err".into()));
    for invalid in [
        "relative",
        "binary://bin/log?x=y",
        "fifo://relative",
        "http://example",
    ] {
        let error = Stdio::new(invalid, "", "", false).expect_err(invalid);
        assert!(error.to_string().contains(invalid), "{error}");
    }
}

#[test]
fn output_can_go_to_a_program() {
    let uri = "binary:///opt/a%20b/log?_KEY=%2Fvar%2Flog&flag&x=1+2";
    let stdio = Stdio::new("", uri, uri, false).expect("valid");
    let Stream::Logger(logger) = &stdio.stdout else {
        panic!("{stdio:?}");
    };
    assert_eq!(logger.program, Path::new("/opt/a b/log"));
    assert_eq!(logger.args, ["_KEY", "/var/log", "flag", "", "x", "1 2"]);
    assert!(!logger.speaks);
    // As containerd asked, for whoever asks containerd.
    assert_eq!(stdio.stdout.to_string(), uri);

    let other = "binary-v2:///opt/log";
    let error = Stdio::new("", uri, other, false).expect_err("two programs");
    assert!(error.to_string().contains(other), "{error}");
    let error = Stdio::new(uri, "", "", false).expect_err("input from a program");
    assert!(error.to_string().contains(uri), "{error}");
}

#[test]
fn a_terminal_has_no_stderr() {
    let stdio = Stdio::new("/i", "/o", "/e", true).expect("valid");
    assert_eq!(stdio.stderr, Stream::None);
}

#[test]
fn a_relative_bundle_is_refused() {
    let stdio = Stdio::new("", "", "", false).expect("valid");
    let error = Create::new("default", "a", Path::new("bundle"), vec![], stdio).expect_err("path");
    assert_eq!(
        error.to_string(),
        "Bundle \"bundle\" is not an absolute path"
    );
}

#[test]
fn each_way_a_bundle_can_be_wrong_is_told_apart() {
    let dir = tempfile::tempdir().expect("tempdir");
    let missing = dir.path().join("missing");
    assert!(matches!(load_spec(&missing), Err(Error::Bundle { .. })));
    assert!(matches!(
        load_spec(dir.path()),
        Err(Error::Unreadable { .. })
    ));

    std::fs::write(dir.path().join("config.json"), "{\"ociVersion\": ").expect("write");
    let error = load_spec(dir.path()).expect_err("truncated");
    assert!(
        matches!(&error, Error::Malformed { source, .. } if source.is_eof()),
        "{error}"
    );

    std::fs::write(dir.path().join("config.json"), "[]").expect("write");
    let error = load_spec(dir.path()).expect_err("an array");
    assert!(matches!(&error, Error::Malformed { .. }), "{error}");

    std::fs::write(
        dir.path().join("config.json"),
        "{\"ociVersion\": \"1.1.0\"}",
    )
    .expect("write");
    assert_eq!(load_spec(dir.path()).expect("minimal").version(), "1.1.0");
}

#[test]
fn an_exec_needs_a_process() {
    let stdio = Stdio::new("", "", "", false).expect("valid");
    Exec::new(
        "a",
        "b",
        b"{\"user\":{\"uid\":0,\"gid\":0},\"cwd\":\"/\"}",
        stdio.clone(),
    )
    .expect("valid");
    assert!(matches!(
        Exec::new("a", "b", b"[]", stdio),
        Err(Error::Malformed { .. })
    ));
}
