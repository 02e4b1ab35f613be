use std::time::Duration;

/// How long to wait for a lock, and where.
///
/// The default waits in the server's queue without a limit.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use dlock_core::Wait;
///
/// let wait = Wait { limit: Some(Duration::from_millis(250)), ..Wait::default() };
/// assert_eq!(wait.remaining(Duration::from_millis(100)), Some(Duration::from_millis(150)));
/// assert_eq!(wait.remaining(Duration::from_secs(1)), Some(Duration::ZERO));
/// assert_eq!(Wait::default().remaining(Duration::from_secs(1)), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// Give up after this long; `None` waits without a limit, zero tries once.
    pub limit: Option<Duration>,
    /// Ask again at this interval and sleep in between, in place of waiting in the server's queue.
    pub poll: Option<Duration>,
}

impl Wait {
    /// The longest wait, in milliseconds, that one statement asks of a server: about 24.8 days, PostgreSQL's
    /// greatest `lock_timeout`. Longer waits ask again.
    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    const LONGEST_MILLIS: u128 = i32::MAX as u128;

    /// Before asking again where a wait ended early.
    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    pub(crate) const PAUSE: Duration = Duration::from_millis(1);

    /// Asks once and never waits.
    pub const TRY: Wait = Wait {
        limit: Some(Duration::ZERO),
        poll: None,
    };

    /// What is left of the limit after `elapsed`; `None` where there is no limit.
    pub fn remaining(&self, elapsed: Duration) -> Option<Duration> {
        self.limit.map(|limit| limit.saturating_sub(elapsed))
    }

    /// How long to wait in the queue where there was no try: one millisecond, the shortest wait, is one.
    #[cfg(feature = "postgres")]
    pub(crate) fn untried(&self, elapsed: Duration) -> Option<u32> {
        match self.after_busy(elapsed) {
            AfterBusy::Queue(millis) => millis,
            AfterBusy::GiveUp | AfterBusy::Sleep(_) => Some(1),
        }
    }

    /// What to do after the server said that the lock is taken.
    #[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
    pub(crate) fn after_busy(&self, elapsed: Duration) -> AfterBusy {
        let remaining = self.remaining(elapsed);
        if remaining == Some(Duration::ZERO) {
            return AfterBusy::GiveUp;
        }
        match self.poll {
            // A shorter pause would be a busy loop on the server.
            Some(interval) => {
                let interval = interval.max(Self::PAUSE);
                AfterBusy::Sleep(remaining.map_or(interval, |left| left.min(interval)))
            }
            None => AfterBusy::Queue(remaining.map(|left| {
                // Rounded up: a wait cut short by a part of a millisecond would have to be asked for again.
                let millis = left.as_nanos().div_ceil(1_000_000);
                millis.min(Self::LONGEST_MILLIS) as u32
            })),
        }
    }
}

/// The next thing to do about a lock that is taken.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AfterBusy {
    /// The limit has passed.
    GiveUp,
    /// Polling: sleep, then ask again.
    Sleep(std::time::Duration),
    /// Wait in the server's queue for that many milliseconds (at least 1), or without a limit.
    Queue(Option<u32>),
}

#[cfg(all(test, any(feature = "postgres", feature = "mysql", feature = "sqlite")))]
mod tests {
    use super::*;

    fn queue(limit: Duration, elapsed: Duration) -> AfterBusy {
        Wait {
            limit: Some(limit),
            poll: None,
        }
        .after_busy(elapsed)
    }

    #[test]
    fn zero_gives_up_at_once() {
        assert_eq!(queue(Duration::ZERO, Duration::ZERO), AfterBusy::GiveUp);
    }

    #[test]
    fn a_part_of_a_millisecond_is_rounded_up_and_never_to_zero() {
        assert_eq!(
            queue(Duration::from_nanos(1), Duration::ZERO),
            AfterBusy::Queue(Some(1))
        );
        assert_eq!(
            queue(Duration::from_micros(1_001), Duration::ZERO),
            AfterBusy::Queue(Some(2))
        );
    }

    #[test]
    fn the_longest_wait_is_cut_into_what_servers_take() {
        assert_eq!(
            queue(Duration::MAX, Duration::from_secs(1)),
            AfterBusy::Queue(Some(i32::MAX as u32))
        );
        assert_eq!(
            Wait::default().after_busy(Duration::MAX),
            AfterBusy::Queue(None)
        );
    }

    #[test]
    fn polling_never_sleeps_past_the_limit_nor_spins() {
        let wait = Wait {
            limit: Some(Duration::from_millis(100)),
            poll: Some(Duration::from_millis(80)),
        };
        assert_eq!(
            wait.after_busy(Duration::ZERO),
            AfterBusy::Sleep(Duration::from_millis(80))
        );
        assert_eq!(
            wait.after_busy(Duration::from_millis(80)),
            AfterBusy::Sleep(Duration::from_millis(20))
        );
        let spin = Wait {
            limit: None,
            poll: Some(Duration::ZERO),
        };
        assert_eq!(
            spin.after_busy(Duration::ZERO),
            AfterBusy::Sleep(Duration::from_millis(1))
        );
    }
}
