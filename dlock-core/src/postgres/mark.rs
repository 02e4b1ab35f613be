use std::fmt;

use crate::proto::unique;

/// A number that no other request of this process has: a session remembers the last request that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark(i64);

impl Mark {
    pub(super) fn new() -> Self {
        match unique() as i64 & i64::MAX {
            0 => Self::new(),
            number => Self(number),
        }
    }

    pub(super) fn number(self) -> i64 {
        self.0
    }

    /// The mark of a statement that also carries its limit, so that both are one bind. The server reads the whole as a
    /// number of milliseconds and rounds it to the nearest: by the 0 behind the point that is the limit.
    pub(super) fn with(self, millis: u32) -> String {
        format!("{millis}.0{self}")
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
