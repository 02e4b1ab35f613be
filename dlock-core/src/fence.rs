use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The name of a savepoint that no other savepoint of this process has.
///
/// In an open transaction it fences off what is sent for a lock: if that fails, the transaction goes on as before, and
/// if the transaction is aborted later, the lock can be released all the same. With one name for all, it would be an
/// outer lock's savepoint that is gone back to.
///
/// # Examples
///
/// ```
/// use dlock_core::Fence;
///
/// assert_ne!(Fence::new(), Fence::new());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence(u64);

impl Fence {
    /// The next name.
    #[expect(
        clippy::new_without_default,
        reason = "a default that differs each time would surprise"
    )]
    pub fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dlock_{}", self.0)
    }
}
