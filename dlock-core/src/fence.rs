use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
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
        Self(unique())
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dlock_{}", self.0)
    }
}

/// A number of which there is no other: it begins anywhere, since a proxy may give a session to one process after
/// another, and a program may have two versions of this crate.
pub(crate) fn unique() -> u64 {
    static NEXT: LazyLock<AtomicU64> =
        LazyLock::new(|| AtomicU64::new(RandomState::new().build_hasher().finish()));
    NEXT.fetch_add(1, Ordering::Relaxed)
}
