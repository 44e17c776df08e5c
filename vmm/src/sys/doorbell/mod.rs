//! A pollable notification, rung from any thread: an eventfd on Linux, elsewhere a pipe.

#[cfg(target_os = "linux")]
mod event;
#[cfg(not(target_os = "linux"))]
mod pipe;

#[cfg(target_os = "linux")]
pub use event::Doorbell;
#[cfg(not(target_os = "linux"))]
pub use pipe::Doorbell;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_count_once_until_cleared() {
        let bell = Doorbell::new().unwrap();
        assert!(!bell.clear().unwrap());
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(bell.clear().unwrap());
        assert!(!bell.clear().unwrap());
    }
}
