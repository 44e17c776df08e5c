use proptest::prelude::*;

use super::*;

/// Runs a program as the kernel's interpreter would, for the instructions that are used.
fn ask(program: &[u64], kind: i32, access: i32, major: i32, minor: i32) -> bool {
    let context = [
        u64::from((access << 16 | kind).unsigned_abs()),
        major as u64,
        minor as u64,
    ];
    let mut registers = [0_u64; 6];
    let mut at = 0;
    // No jump leads back, so it ends.
    while let Some(&word) = program.get(at) {
        let (to, from) = ((word >> 8 & 15) as usize, (word >> 12 & 15) as usize);
        let offset = (word >> 16) as u16;
        let value = word >> 32;
        at += 1;
        let mut jump = |taken: bool| at += if taken { usize::from(offset) } else { 0 };
        match word as u8 {
            LOAD_WORD => registers[to] = context[usize::from(offset) / 4],
            MOVE_IMMEDIATE => registers[to] = value,
            MOVE => registers[to] = registers[from],
            AND_IMMEDIATE => registers[to] &= value,
            SHIFT_RIGHT => registers[to] >>= value,
            JUMP_IF => jump(registers[to] == value),
            JUMP_IF_NOT => jump(registers[to] != value),
            JUMP_IF_NOT_REGISTER => jump(registers[to] != registers[from]),
            EXIT => return registers[0] == 1,
            code => panic!("instruction {code:#x}"),
        }
    }
    panic!("it doesn't end")
}

fn rules(json: serde_json::Value) -> Vec<Rule> {
    let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
    rules.iter().map(|rule| Rule::of(rule).unwrap()).collect()
}

#[test]
fn what_containerd_asks_for() {
    let mut all = rules(serde_json::json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
        {"allow": false, "type": "c", "major": 10, "access": "w"},
    ]));
    all.extend(ALWAYS);
    let program = program(&all);
    let ask = |kind, access, major, minor| ask(&program, kind, access, major, minor);
    assert!(ask(CHARACTER, READ | WRITE, 1, 3), "null");
    assert!(ask(CHARACTER, READ | WRITE, 136, 77), "a terminal");
    assert!(
        ask(CHARACTER, MKNOD, 1, 1) && ask(BLOCK, MKNOD, 253, 0),
        "mknod of any"
    );
    assert!(!ask(CHARACTER, READ, 1, 1), "mem");
    assert!(
        !ask(CHARACTER, READ | MKNOD, 1, 1),
        "part of what is asked for"
    );
    assert!(!ask(BLOCK, READ, 253, 0), "a disk");
    assert!(ask(CHARACTER, READ, 10, 229), "fuse");
    assert!(!ask(CHARACTER, READ | WRITE, 10, 229), "a later rule");
}

#[test]
fn privileged_containers_may_do_all() {
    let program = program(&rules(
        serde_json::json!([{"allow": true, "type": "a", "access": "rwm"}]),
    ));
    assert!(ask(&program, BLOCK, ALL, 8, 0) && ask(&program, CHARACTER, READ, 1, 1));
}

/// The kernel refuses a program with steps that are never reached.
#[test]
fn a_rule_for_everything_ends_the_program() {
    let mut all = rules(serde_json::json!([
        {"allow": true, "type": "c", "major": 1, "access": "r"},
        {"allow": false, "access": "rwm"},
    ]));
    let short = program(&all);
    all.remove(0);
    assert_eq!(short, program(&all));
}

#[test]
fn rules_that_make_no_sense_are_named() {
    for wrong in [
        serde_json::json!({"allow": true, "type": "c", "access": "x"}),
        serde_json::json!({"allow": true, "type": "p", "access": "r"}),
        serde_json::json!({"allow": true, "major": 1_i64 << 40, "access": "r"}),
    ] {
        let rule: LinuxDeviceCgroup = serde_json::from_value(wrong).unwrap();
        let error = Rule::of(&rule).unwrap_err().to_string();
        assert!(error.contains("device rule"), "{error}");
    }
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let number = || proptest::option::of(0..4_i32);
    (
        any::<bool>(),
        proptest::option::of(1..=2_i32),
        number(),
        number(),
        1..=ALL,
    )
        .prop_map(|(allow, kind, major, minor, access)| Rule {
            allow,
            kind,
            major,
            minor,
            access,
        })
}

proptest! {
    /// The program answers as the rules read.
    #[test]
    fn the_last_rule_that_matches_decides(
        rules in proptest::collection::vec(any_rule(), 0..20),
        kind in 1..=2_i32, access in 1..=ALL, major in 0..4_i32, minor in 0..4_i32,
    ) {
        let matches = |rule: &&Rule| {
            let same = |wanted: Option<i32>, found| wanted.is_none_or(|wanted| wanted == found);
            let access = if rule.allow {
                access & !rule.access == 0
            } else {
                access & rule.access != 0
            };
            same(rule.kind, kind) && same(rule.major, major) && same(rule.minor, minor) && access
        };
        let expected = rules.iter().rev().find(matches).is_some_and(|rule| rule.allow);
        prop_assert_eq!(ask(&program(&rules), kind, access, major, minor), expected);
    }
}
