use super::*;

#[test]
fn every_generated_serial_fits_a_disk() {
    for index in [0, 1, 255, u32::MAX] {
        assert!(is_disk_serial(&lower_disk_serial(index)));
        assert!(is_disk_serial(&writable_disk_serial(index)));
        assert_ne!(lower_disk_serial(index), writable_disk_serial(index));
    }
}

#[test]
fn a_serial_that_sysfs_could_not_show_is_refused() {
    for serial in ["", "a b", "a/b", "a\n", "é", "123456789012345678901"] {
        assert!(!is_disk_serial(serial), "{serial:?}");
    }
    assert!(is_disk_serial("12345678901234567890"));
}

#[test]
fn only_the_same_version_is_spoken() {
    assert_eq!(version_mismatch("host", VERSION), None);
    let text = version_mismatch("host", VERSION + 1).unwrap();
    assert!(text.contains("host") && text.contains(&(VERSION + 1).to_string()));
}

#[test]
fn port_names_are_distinct() {
    assert_eq!(console_port_name(AGENT_CONSOLE_PORT), AGENT_CONSOLE_NAME);
    assert_ne!(console_port_name(1), console_port_name(2));
}

#[test]
fn a_request_survives_the_wire() {
    use protobuf::Message;
    let mut overlay = OverlayRootfs::new();
    overlay.lower_disks = vec![lower_disk_serial(0), lower_disk_serial(1)];
    overlay.writable_disk = writable_disk_serial(0);
    let mut rootfs = Rootfs::new();
    rootfs.set_overlay(overlay);
    let mut request = CreateContainerRequest::new();
    request.container_id = "c1".to_owned();
    request.rootfs = Some(rootfs).into();
    request.spec_json = b"{}".to_vec();
    let bytes = request.write_to_bytes().unwrap();
    assert_eq!(
        CreateContainerRequest::parse_from_bytes(&bytes).unwrap(),
        request
    );
}
