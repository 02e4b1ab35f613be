use std::fmt;

use crate::proto::unique;

/// A number that no other request of this process has: a session remembers the last request that was granted. It also
/// carries the limit of the request's statement, so that both are one bind. It is negative if the statement does not
/// wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(i64);

impl Mark {
    /// The longest limit that it can carry, in milliseconds.
    pub(super) const LONGEST: u32 = 4095;

    pub(super) fn new() -> Self {
        match (unique() << 12) as i64 & i64::MAX {
            0 => Self::new(),
            number => Self(number),
        }
    }

    pub(super) fn with(self, millis: u32) -> Self {
        match millis.min(Self::LONGEST) {
            0 => Self(-self.0),
            millis => Self(self.0 | i64::from(millis)),
        }
    }

    pub(super) fn number(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
