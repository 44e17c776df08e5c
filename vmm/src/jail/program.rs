//! Filters as programs of the kernel's: classic BPF over `struct seccomp_data` (seccomp(2)).
//!
//! Each time a thread installs a program, the kernel translates it, and tries it with the number of
//! every system call that has been allowed so far. A VM's start waits for that, so a program is short:
//! it looks for the run of numbers that a call is in by halving, and where the process has a program, a
//! thread's says only what differs.

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

/// So many runs are told one by one, not halved: where every other one is a single number, that takes
/// no more steps and fewer statements.
const FEW: usize = 7;

/// The program that answers with `otherwise` for calls that `verdicts` doesn't have or allow. A
/// call of another architecture ends the process.
pub(super) fn compile(verdicts: &Verdicts, otherwise: u32) -> Vec<sock_filter> {
    let mut runs = Runs::default();
    let mut next = 0;
    for (number, verdict) in verdicts {
        if *number != next {
            runs.add(next, &Verdict::Forbid);
        }
        runs.add(*number, verdict);
        next = number.saturating_add(1);
    }
    runs.add(next, &Verdict::Forbid);
    let mut program = Program::default();
    program.tell(&runs, otherwise);
    let native = program.next();
    let foreign = program.answer(libc::SECCOMP_RET_KILL_PROCESS);
    program.test(libc::BPF_JEQ, NATIVE, native, foreign);
    program.load(ARCH);
    program.finish()
}

/// The program that, where one of `all` is in force, leaves of it what `verdicts` has: of two answers
/// the kernel takes the stricter. So it allows what is not to change, and may say anything of a
/// number that `all` doesn't have.
pub(super) fn narrow(all: &Verdicts, verdicts: &Verdicts, otherwise: u32) -> Vec<sock_filter> {
    let mut runs = Runs::default();
    for (number, all) in all {
        let left = verdicts.get(number).unwrap_or(&Verdict::Forbid);
        runs.add(*number, if left == all { &Verdict::Allow } else { left });
    }
    let mut program = Program::default();
    program.tell(&runs, otherwise);
    program.finish()
}

/// Numbers that one after the other have the same verdict: the first of each run, in order. A run
/// ends where the next one begins; numbers below the first belong to it.
#[derive(Debug, Default)]
struct Runs<'a>(Vec<(u32, &'a Verdict)>);

impl<'a> Runs<'a> {
    fn add(&mut self, first: u32, verdict: &'a Verdict) {
        if self.0.last().is_none_or(|(_, last)| *last != verdict) {
            self.0.push((first, verdict));
        }
    }
}

/// A program from its end to its beginning, as jumps go forward only and so know where they go.
#[derive(Debug, Default)]
struct Program {
    reversed: Vec<sock_filter>,
    /// Where the answers are that were last given.
    answers: BTreeMap<u32, Place>,
}

/// A statement of a program, counted from its end.
type Place = usize;

/// How far a test is sure to reach, two more statements before it notwithstanding.
const NEAR: usize = u8::MAX as usize - 2;

impl Program {
    fn finish(mut self) -> Vec<sock_filter> {
        self.reversed.reverse();
        self.reversed
    }

    /// The statement that was last added, which is the next one of the program.
    fn next(&self) -> Place {
        self.reversed.len().saturating_sub(1)
    }

    /// Loads the number, and gives each its verdict.
    fn tell(&mut self, runs: &Runs<'_>, otherwise: u32) {
        let first = self.branch(&runs.0, otherwise);
        self.go_on_at(first);
        self.load(NUMBER);
    }

    fn branch(&mut self, runs: &[(u32, &Verdict)], otherwise: u32) -> Place {
        match runs {
            // Nothing is forbidden.
            [] => self.answer(libc::SECCOMP_RET_ALLOW),
            [(_, verdict)] => self.verdict(verdict, otherwise),
            [(_, around), (number, alone), rest @ ..]
                if runs.len() <= FEW
                    && rest.first() == Some(&(number.saturating_add(1), *around)) =>
            {
                let no = self.branch(rest, otherwise);
                let yes = self.verdict(alone, otherwise);
                self.test(libc::BPF_JEQ, *number, yes, no)
            }
            _ => {
                let (lower, upper) = runs.split_at(runs.len() / 2);
                let no = self.branch(lower, otherwise);
                let yes = self.branch(upper, otherwise);
                let first = upper.first().map_or(0, |(first, _)| *first);
                self.test(libc::BPF_JGE, first, yes, no)
            }
        }
    }

    fn verdict(&mut self, verdict: &Verdict, otherwise: u32) -> Place {
        match verdict {
            Verdict::Allow => self.answer(libc::SECCOMP_RET_ALLOW),
            Verdict::Forbid => self.answer(otherwise),
            Verdict::Fail(errno) => self.answer(libc::SECCOMP_RET_ERRNO | u32::from(*errno)),
            Verdict::AllowIf(conditions) => self.either(conditions, otherwise),
        }
    }

    /// Allows if one of the conditions holds.
    fn either(&mut self, conditions: &[When], otherwise: u32) -> Place {
        let mut no = self.answer(otherwise);
        // Conditions on the same bits share their loading.
        for alike in conditions.chunk_by(|a, b| bits(a) == bits(b)).rev() {
            for condition in alike.iter().rev() {
                let (When::Is(_, value) | When::Masked(_, _, value)) = *condition;
                let yes = self.answer(libc::SECCOMP_RET_ALLOW);
                no = self.test(libc::BPF_JEQ, value, yes, no);
            }
            self.go_on_at(no);
            if let Some((place, mask)) = alike.first().map(bits) {
                if mask != u32::MAX {
                    self.add(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask, 0, 0);
                }
                no = self.load(ARGUMENTS + 8 * u32::from(place));
            }
        }
        no
    }

    /// An answer in reach: one there is, or another.
    fn answer(&mut self, action: u32) -> Place {
        match self.answers.get(&action) {
            Some(place) if self.reversed.len() - place < NEAR => *place,
            _ => {
                let place = self.add(libc::BPF_RET | libc::BPF_K, action, 0, 0);
                self.answers.insert(action, place);
                place
            }
        }
    }

    /// Goes on at `yes` if the comparison holds, else at `no`.
    fn test(&mut self, comparison: u32, k: u32, yes: Place, no: Place) -> Place {
        let [yes, no] = [yes, no].map(|place| self.in_reach(place));
        let [yes, no] = [yes, no].map(|place| (self.reversed.len() - place - 1) as u8);
        self.add(libc::BPF_JMP | comparison | libc::BPF_K, k, yes, no)
    }

    /// This place, or a jump there.
    fn in_reach(&mut self, place: Place) -> Place {
        if self.reversed.len() - place < NEAR {
            return place;
        }
        self.jump(place)
    }

    fn go_on_at(&mut self, place: Place) {
        if place != self.next() {
            self.jump(place);
        }
    }

    fn jump(&mut self, place: Place) -> Place {
        let distance = self.reversed.len() - place - 1;
        self.add(libc::BPF_JMP | libc::BPF_JA, distance as u32, 0, 0)
    }

    fn load(&mut self, offset: u32) -> Place {
        self.add(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0)
    }

    fn add(&mut self, code: u32, k: u32, jt: u8, jf: u8) -> Place {
        // linux/bpf_common.h has no code above 0xff.
        let code = code as u16;
        self.reversed.push(sock_filter { code, jt, jf, k });
        self.next()
    }
}

/// The argument a condition looks at, and what of it.
fn bits(condition: &When) -> (u8, u32) {
    match *condition {
        When::Is(place, _) => (place, u32::MAX),
        When::Masked(place, mask, _) => (place, mask),
    }
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
