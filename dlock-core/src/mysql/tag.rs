use std::num::NonZeroI64;

use crate::proto::{Bind, Failure, unique};

/// A number that the server adds to its answer, so that a stale answer is recognized.
///
/// diesel-async (0.9) gives the answer that a dropped future did not read to the next query, and no pool notices. The
/// session remembers the tag of the last lock that it was asked for, so that after a failure a lock which is there can
/// be told from an outer guard's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag(NonZeroI64);

impl Tag {
    /// Stands in the text, as a number of 64 bits. MariaDB (11.8) would give the answer 32 bits by the binds alone.
    const BASE: i64 = 4_611_686_018_427_387_904;

    /// Far from all others, and from what a user's query may answer.
    pub(super) fn new() -> Self {
        const BITS_OF_AN_ANSWER: u32 = 8;
        let number = (unique() << BITS_OF_AN_ANSWER) % (1 << 61);
        NonZeroI64::new(number as i64).map_or_else(Self::new, Self)
    }

    pub(super) fn number(self) -> i64 {
        self.0.get()
    }

    pub(super) fn bind(self) -> Bind {
        Bind::BigInt(self.number())
    }

    /// The answer without this tag, if it is from 0 to 9.
    pub(super) fn remove(self, answer: Option<i64>) -> Result<i64, Failure> {
        self.remove_place(answer, 9)
    }

    /// The answer without this tag, if it is from 0 to `last`.
    pub(super) fn remove_place(self, answer: Option<i64>, last: usize) -> Result<i64, Failure> {
        answer
            .map(|answer| answer.wrapping_sub(Self::BASE).wrapping_sub(self.number()))
            .filter(|answer| usize::try_from(*answer).is_ok_and(|answer| answer <= last))
            .ok_or_else(Failure::out_of_step)
    }
}
