//! Filters as programs of the kernel's: classic BPF over `struct seccomp_data` (seccomp(2)).
//!
//! Each time a thread installs a program, the kernel translates it and tries it with the number of
//! every system call there is. A VM's start waits for that, so a program is short, and finds a
//! number by halving; and where the process has a program, a thread's says only what differs.

use std::collections::BTreeMap;

use seccompiler::sock_filter;

use super::filter::When;

/// What becomes of one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Forbid,
    /// It fails with this error, as if the kernel had no such call.
    Fail(u16),
    /// Allowed on one of these conditions.
    AllowIf(Vec<When>),
}

/// By number.
pub(super) type Verdicts = BTreeMap<u32, Verdict>;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// The lower half of the first argument; processors are little-endian.
const ARGUMENTS: u32 = 16;

/// `AUDIT_ARCH_*` of linux/audit.h: the ELF machine, 64 bits, little-endian.
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = libc::EM_X86_64 as u32 | 0xc000_0000;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = libc::EM_AARCH64 as u32 | 0xc000_0000;

/// Where halving ends. Distances among as many fit a jump.
const FEW: usize = 8;

/// The program that answers with `otherwise` for calls that `verdicts` doesn't have or allow. A
/// call of another architecture ends the process.
pub(super) fn compile(verdicts: &Verdicts, otherwise: u32) -> Vec<sock_filter> {
    let mut program = vec![load(ARCH), test(libc::BPF_JEQ, NATIVE, 1, 0)];
    program.push(answer(libc::SECCOMP_RET_KILL_PROCESS));
    program.extend(tell(verdicts, otherwise, otherwise));
    program
}

/// The program that, where one of `all` is in force, leaves of it what `verdicts` has: of two answers
/// the kernel takes the stricter. It allows what it does not name, as the other knows what becomes
/// of that.
pub(super) fn narrow(all: &Verdicts, verdicts: &Verdicts, otherwise: u32) -> Vec<sock_filter> {
    let fewer = all.iter().filter_map(|(number, all)| {
        let left = verdicts.get(number).unwrap_or(&Verdict::Forbid);
        (left != all).then(|| (*number, left.clone()))
    });
    tell(&fewer.collect(), libc::SECCOMP_RET_ALLOW, otherwise)
}

/// What is forbidden gets the answer `otherwise`, what `verdicts` doesn't have `unknown`.
fn tell(verdicts: &Verdicts, unknown: u32, otherwise: u32) -> Vec<sock_filter> {
    let calls: Vec<(u32, &Verdict)> = verdicts
        .iter()
        .map(|(number, verdict)| (*number, verdict))
        .collect();
    let mut program = vec![load(NUMBER)];
    program.extend(search(&calls, unknown, otherwise));
    program
}

/// Every way through it ends with an answer.
fn search(calls: &[(u32, &Verdict)], unknown: u32, otherwise: u32) -> Vec<sock_filter> {
    if calls.len() <= FEW {
        return among_few(calls, unknown, otherwise);
    }
    let (lower, upper) = calls.split_at(calls.len() / 2);
    let upper_half = search(upper, unknown, otherwise);
    let mut program = when(libc::BPF_JGE, upper[0].0, upper_half);
    program.extend(search(lower, unknown, otherwise));
    program
}

fn among_few(calls: &[(u32, &Verdict)], unknown: u32, otherwise: u32) -> Vec<sock_filter> {
    let mut program = Vec::new();
    let mut plain = BTreeMap::<u32, Vec<u32>>::new();
    for (number, verdict) in calls {
        let body = match verdict {
            Verdict::Allow => {
                plain
                    .entry(libc::SECCOMP_RET_ALLOW)
                    .or_default()
                    .push(*number);
                continue;
            }
            Verdict::Forbid => {
                plain.entry(otherwise).or_default().push(*number);
                continue;
            }
            Verdict::Fail(errno) => {
                vec![answer(libc::SECCOMP_RET_ERRNO | u32::from(*errno))]
            }
            Verdict::AllowIf(conditions) => either(conditions, otherwise),
        };
        program.extend(when(libc::BPF_JEQ, *number, body));
    }
    // What gets the answer of the unknown needs no word.
    plain.remove(&unknown);
    for (shared, numbers) in plain {
        // They share an answer, which the last one goes around.
        for (number, rest) in numbers.iter().zip((0..numbers.len() as u8).rev()) {
            program.push(test(libc::BPF_JEQ, *number, rest, u8::from(rest == 0)));
        }
        program.push(answer(shared));
    }
    program.push(answer(unknown));
    program
}

/// Allows if one of the conditions holds.
fn either(conditions: &[When], otherwise: u32) -> Vec<sock_filter> {
    let mut program = Vec::new();
    let mut loaded = None;
    for condition in conditions {
        let (place, mask, value) = match *condition {
            When::Is(place, value) => (place, u32::MAX, value),
            When::Masked(place, mask, value) => (place, mask, value),
        };
        if loaded.replace((place, mask)) != Some((place, mask)) {
            program.push(load(ARGUMENTS + 8 * u32::from(place)));
            if mask != u32::MAX {
                program.push(statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask));
            }
        }
        let allow = vec![answer(libc::SECCOMP_RET_ALLOW)];
        program.extend(when(libc::BPF_JEQ, value, allow));
    }
    program.push(answer(otherwise));
    program
}

/// Goes through `body` if the test holds, and around it if not.
fn when(comparison: u32, value: u32, body: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut program = match u8::try_from(body.len()) {
        Ok(length) => vec![test(comparison, value, 0, length)],
        Err(_) => vec![
            test(comparison, value, 1, 0),
            statement(libc::BPF_JMP | libc::BPF_JA, body.len() as u32),
        ],
    };
    program.extend(body);
    program
}

fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn answer(action: u32) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}

fn statement(code: u32, k: u32) -> sock_filter {
    instruction(code, k, 0, 0)
}

/// Skips `yes` instructions if the comparison holds, else `no`.
fn test(comparison: u32, k: u32, yes: u8, no: u8) -> sock_filter {
    instruction(libc::BPF_JMP | comparison | libc::BPF_K, k, yes, no)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    // linux/bpf_common.h has no code above 0xff.
    let code = code as u16;
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    const OTHERWISE: u32 = libc::SECCOMP_RET_TRAP;

    /// What a kernel does with the program (bpf(4) of the BSDs), as far as programs here go.
    fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut accumulator, mut next) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[next].clone();
            next += 1;
            let mut jump = |holds: bool| next += usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                0x20 => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCH => arch,
                        _ => {
                            let at = k - ARGUMENTS;
                            assert!(at.is_multiple_of(8), "the upper half is never looked at");
                            arguments[at as usize / 8] as u32
                        }
                    };
                }
                0x54 => accumulator &= k,
                0x15 => jump(accumulator == k),
                0x35 => jump(accumulator >= k),
                0x05 => next += k as usize,
                0x06 => return k,
                other => panic!("no code of ours: {other:#x}"),
            }
        }
    }

    fn expected(verdicts: &Verdicts, number: u32, arguments: [u64; 6]) -> u32 {
        let holds = |condition: &When| match *condition {
            When::Is(place, value) => arguments[usize::from(place)] as u32 == value,
            When::Masked(place, mask, value) => {
                arguments[usize::from(place)] as u32 & mask == value
            }
        };
        match verdicts.get(&number) {
            Some(Verdict::Allow) => libc::SECCOMP_RET_ALLOW,
            Some(Verdict::Forbid) => OTHERWISE,
            Some(Verdict::Fail(errno)) => libc::SECCOMP_RET_ERRNO | u32::from(*errno),
            Some(Verdict::AllowIf(conditions)) if conditions.iter().any(holds) => {
                libc::SECCOMP_RET_ALLOW
            }
            Some(Verdict::AllowIf(_)) | None => OTHERWISE,
        }
    }

    /// Small values, so that conditions are met.
    fn condition() -> impl Strategy<Value = When> {
        prop_oneof![
            (0..6_u8, 0..4_u32).prop_map(|(place, value)| When::Is(place, value)),
            (0..6_u8, 0..4_u32, 0..4_u32)
                .prop_map(|(place, mask, value)| When::Masked(place, mask, value)),
        ]
    }

    fn verdict() -> impl Strategy<Value = Verdict> {
        prop_oneof![
            4 => Just(Verdict::Allow),
            1 => Just(Verdict::Forbid),
            1 => (1..100_u16).prop_map(Verdict::Fail),
            // Enough of them that a jump around the rest is a long one.
            2 => vec(condition(), 1..150).prop_map(Verdict::AllowIf),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn answers_are_those_of_the_table(
            verdicts in btree_map(0..400_u32, verdict(), 0..120),
            arguments in proptest::array::uniform6(0..4_u64),
        ) {
            let program = compile(&verdicts, OTHERWISE);
            for number in 0..=400 {
                let found = run(&program, NATIVE, number, arguments);
                prop_assert_eq!(found, expected(&verdicts, number, arguments), "call {}", number);
            }
        }
    }

    /// The order in which the kernel takes answers (seccomp(2)); the first one wins.
    fn strictness(answer: &u32) -> usize {
        let order = [
            libc::SECCOMP_RET_KILL_PROCESS,
            OTHERWISE,
            libc::SECCOMP_RET_ERRNO,
            libc::SECCOMP_RET_ALLOW,
        ];
        let action = answer & libc::SECCOMP_RET_ACTION_FULL;
        order.iter().position(|known| *known == action).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_thread_has_what_both_leave(
            all in btree_map(0..200_u32, verdict(), 0..120),
            own in btree_map(0..200_u32, verdict(), 0..60),
            same in vec(proptest::sample::Index::arbitrary(), 0..60),
            arguments in proptest::array::uniform6(0..4_u64),
        ) {
            let mut own = own;
            for index in same.iter().filter(|_| !all.is_empty()) {
                let (number, verdict) = all.iter().nth(index.index(all.len())).unwrap();
                own.insert(*number, verdict.clone());
            }
            let process = compile(&all, OTHERWISE);
            let thread = narrow(&all, &own, OTHERWISE);
            for number in 0..=200 {
                let found = [&process, &thread].map(|program| run(program, NATIVE, number, arguments));
                let wanted = [&all, &own].map(|verdicts| expected(verdicts, number, arguments));
                prop_assert_eq!(
                    found.iter().min_by_key(|answer| strictness(answer)),
                    wanted.iter().min_by_key(|answer| strictness(answer)),
                    "call {}", number
                );
            }
        }
    }

    #[test]
    fn other_numbers_and_architectures_are_forbidden() {
        let verdicts = (0..50).map(|number| (number, Verdict::Allow)).collect();
        let program = compile(&verdicts, OTHERWISE);
        let ia32 = 0x4000_0003;
        assert_eq!(
            run(&program, ia32, 1, [0; 6]),
            libc::SECCOMP_RET_KILL_PROCESS
        );
        // The numbers of x32.
        for number in [50, 0x4000_0001, u32::MAX] {
            assert_eq!(run(&program, NATIVE, number, [0; 6]), OTHERWISE);
        }
    }
}
