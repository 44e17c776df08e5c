//! The host's entropy.

use std::io;

/// Fills `bytes` from the host's generator. Needs no file, so it works in a confined process.
///
/// # Errors
/// When the host has no generator or forbids its use.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    // The most that neither system cuts short.
    for part in bytes.chunks_mut(256) {
        fill_part(part)?;
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn fill_part(part: &mut [u8]) -> io::Result<()> {
    loop {
        // SAFETY: writes at most the length given, into a buffer of that length.
        let written = unsafe { libc::getrandom(part.as_mut_ptr().cast(), part.len(), 0) };
        match usize::try_from(written) {
            Ok(written) if written == part.len() => return Ok(()),
            // Cut short by a signal, which only an uninitialised generator allows: once more.
            Ok(_) => {}
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn fill_part(part: &mut [u8]) -> io::Result<()> {
    // SAFETY: writes exactly the length given, into a buffer of that length.
    match unsafe { libc::getentropy(part.as_mut_ptr().cast(), part.len()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_all_and_never_the_same() {
        let (mut first, mut second) = ([0; 1000], [0; 1000]);
        fill(&mut first).unwrap();
        fill(&mut second).unwrap();
        assert_ne!(first, second);
        // 16 zeroes in a row are 1 in 2^120 here.
        assert!(!first.windows(16).any(|bytes| bytes == [0; 16]));
    }
}
