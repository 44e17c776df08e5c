//! Messages here are written byte by byte from containerd's definitions
//! (api/runtime/bootstrap/v1/bootstrap.proto, api/types/introspection.proto), not by the generated
//! code that reads them.

use std::collections::BTreeMap;

use protobuf::well_known_types::any::Any;

use super::*;

/// A field of wire type 2: text, bytes or a message.
fn bytes(number: u8, value: &[u8]) -> Vec<u8> {
    assert!(value.len() < 128, "one byte of length");
    let length = u8::try_from(value.len()).unwrap();
    [&[number << 3 | 2, length], value].concat()
}

/// A field of wire type 0.
fn varint(number: u8, value: i64) -> Vec<u8> {
    let mut all = vec![number << 3];
    let mut left = u64::from_ne_bytes(value.to_ne_bytes());
    while left > 0x7f {
        all.push(u8::try_from(left & 0x7f).unwrap() | 0x80);
        left >>= 7;
    }
    all.push(u8::try_from(left).unwrap());
    all
}

/// The fields of a message, by number; a varint as its bytes.
fn fields(mut message: &[u8]) -> BTreeMap<u8, Vec<u8>> {
    let mut found = BTreeMap::new();
    while let [tag, rest @ ..] = message {
        let length = match tag & 7 {
            0 => rest.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1,
            2 => usize::from(rest[0]) + 1,
            other => panic!("wire type {other}"),
        };
        let skip = usize::from(tag & 7 == 2);
        found.insert(tag >> 3, rest[skip..length].to_vec());
        message = &rest[length..];
    }
    found
}

/// What containerd 2.3 writes for container c1.
fn params_of_containerd() -> Vec<u8> {
    let options = [
        bytes(1, b"containerd.runc.v1.Options"),
        bytes(2, &[0x10, 1]),
    ]
    .concat();
    [
        bytes(1, b"c1"),
        bytes(2, b"default"),
        // LOG_LEVEL_DEBUG
        varint(3, -4),
        bytes(4, b"2.3.4"),
        bytes(5, b"/run/containerd/containerd.sock.ttrpc"),
        bytes(6, b"/run/containerd/containerd.sock"),
        bytes(7, b"/usr/bin/containerd"),
        bytes(8, &bytes(1, &options)),
        bytes(9, b"/run/s"),
        // A field of a later containerd's.
        bytes(15, b"?"),
    ]
    .concat()
}

fn args(line: &str) -> Args {
    Args::parse(line.split_whitespace().map(str::to_owned)).unwrap()
}

#[test]
fn parameters_complete_the_command_line() {
    let found = decode(&params_of_containerd(), args("start")).unwrap();
    assert_eq!(found.args.id, "c1");
    assert_eq!(found.args.namespace, "default");
    assert_eq!(found.args.address, "/run/containerd/containerd.sock");
    assert_eq!(
        found.args.ttrpc_address,
        "/run/containerd/containerd.sock.ttrpc"
    );
    assert_eq!(found.args.publish_binary, "/usr/bin/containerd");
    assert!(found.args.debug);
    assert_eq!(found.socket_dir.as_deref(), Some("/run/s"));
    assert_eq!(found.form, Form::Protobuf);
}

#[test]
fn flags_go_before_parameters() {
    let line = args("-namespace default -id c1 -address /other.sock start");
    let found = decode(&params_of_containerd(), line).unwrap();
    assert_eq!(found.args.address, "/other.sock");
    assert_eq!(found.form, Form::Protobuf);
}

#[test]
fn parameters_for_another_container_are_refused() {
    for line in [
        "-namespace default -id c2 start",
        "-namespace other -id c1 start",
    ] {
        let error = decode(&params_of_containerd(), args(line)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("\"c1\" in namespace \"default\""),
            "{error}"
        );
    }
}

#[test]
fn options_nothing_and_nonsense_are_no_parameters() {
    let mut options = Any::new();
    options.type_url = "containerd.runc.v1.Options".to_owned();
    options.value = vec![0x10, 0x01];
    let line = "-namespace default -id c1 start";
    for bytes in [options.write_to_bytes().unwrap(), Vec::new(), vec![0xff; 3]] {
        let found = decode(&bytes, args(line)).unwrap();
        assert_eq!(found.args, args(line));
        assert_eq!(found.socket_dir, None);
        assert_eq!(found.form, Form::Json);
        let error = decode(&bytes, args("start")).unwrap_err();
        assert!(error.to_string().contains("-namespace"), "{error}");
    }
}

#[test]
fn a_relative_socket_directory_is_refused() {
    let params = [params_of_containerd(), bytes(9, b"run/s")].concat();
    let error = decode(&params, args("start")).unwrap_err();
    assert!(error.to_string().contains("\"run/s\""), "{error}");
}

#[test]
fn the_answer_has_the_form_of_the_question() {
    let address = "unix:///run/containerd/s/x";
    let json = encode(address, Form::Json).unwrap();
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&json).unwrap(),
        serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" })
    );
    // containerd 2.3 tries protobuf first, so JSON must not parse as that.
    assert!(BootstrapResult::parse_from_bytes(&json).is_err());

    let result = fields(&encode(address, Form::Protobuf).unwrap());
    let expected = [(1, vec![3]), (2, address.into()), (3, b"ttrpc".to_vec())];
    assert_eq!(result, BTreeMap::from(expected));
}

#[test]
fn info_names_the_mounts_left_to_the_shim() {
    let info = fields(&info().write_to_bytes().unwrap());
    assert_eq!(info[&1], RUNTIME.as_bytes());
    assert_eq!(fields(&info[&2])[&1], VERSION.as_bytes());
    let annotation = fields(&info[&5]);
    assert_eq!(annotation[&1], b"containerd.io/runtime-allow-mounts");
    let kinds = String::from_utf8(annotation[&2].clone()).unwrap();
    // As containerd takes it apart: no spaces, no empty words.
    assert!(
        kinds
            .split(',')
            .all(|kind| !kind.is_empty() && kind == kind.trim())
    );
    assert!(kinds.split(',').any(|kind| kind == "format/*"));
}
