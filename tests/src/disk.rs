//! What the bench of disks and its guest agree on.

/// CPUID of this leaf announces the beginning of a case, by an even subleaf, and its end.
pub const MARKER: u32 = 0x534d_4244;

/// One kind of disk I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// Whether it writes.
    pub write: bool,
    /// Whether each request is somewhere else.
    pub random: bool,
    /// Bytes of a request.
    pub block: usize,
    /// Requests at once.
    pub depth: usize,
}

const SEQUENTIAL: usize = 128 << 10;
const RANDOM: usize = 4 << 10;

/// All of them, in order.
pub const CASES: [Case; 8] = [
    case("read 128 KiB in order, 1 at a time", false, false, 1),
    case("read 128 KiB in order, 32 at a time", false, false, 32),
    case("write 128 KiB in order, 1 at a time", true, false, 1),
    case("write 128 KiB in order, 32 at a time", true, false, 32),
    case("read 4 KiB anywhere, 1 at a time", false, true, 1),
    case("read 4 KiB anywhere, 32 at a time", false, true, 32),
    case("write 4 KiB anywhere, 1 at a time", true, true, 1),
    case("write 4 KiB anywhere, 32 at a time", true, true, 32),
];

const fn case(name: &'static str, write: bool, random: bool, depth: usize) -> Case {
    Case {
        name,
        write,
        random,
        block: if random { RANDOM } else { SEQUENTIAL },
        depth,
    }
}
