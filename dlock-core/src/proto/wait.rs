use std::time::Duration;

/// How long to wait for a lock, and where.
///
/// The default waits in the server's queue without a limit.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use dlock_core::proto::Wait;
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
    /// The longest wait, in milliseconds, that one statement asks of a server: about 24.8 days. Longer waits ask again.
    const LONGEST_MILLIS: u128 = i32::MAX as u128;

    /// Before asking again where a wait ended early.
    pub(crate) const PAUSE: Duration = Duration::from_millis(1);

    /// What is left of the limit after `elapsed`; `None` where there is no limit.
    pub fn remaining(&self, elapsed: Duration) -> Option<Duration> {
        self.limit.map(|limit| limit.saturating_sub(elapsed))
    }

    /// The wait starts.
    pub(crate) fn since(self, now: Duration) -> Waiting {
        Waiting {
            wait: self,
            since: now,
        }
    }

    /// What to do `elapsed` after the start, when the server has said that the lock is taken.
    fn after_busy(&self, elapsed: Duration) -> AfterBusy {
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

/// A wait that has started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    wait: Wait,
    since: Duration,
}

impl Waiting {
    /// It starts now.
    pub(crate) fn start(&mut self, now: Duration) {
        self.since = now;
    }

    /// How long it has lasted.
    pub(crate) fn waited(&self, now: Duration) -> Duration {
        now.saturating_sub(self.since)
    }

    /// What to do after the server said that the lock is taken.
    pub(crate) fn after_busy(&self, now: Duration) -> AfterBusy {
        self.wait.after_busy(self.waited(now))
    }

    /// How long the first statement may wait in the queue, in milliseconds: `Some(0)` only tries, `None` has no limit.
    pub(crate) fn first(&self, now: Duration) -> Option<u32> {
        match self.after_busy(now) {
            AfterBusy::GiveUp | AfterBusy::Sleep(_) => Some(0),
            AfterBusy::Queue(millis) => millis,
        }
    }
}

/// The next thing to do about a lock that is taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AfterBusy {
    /// The limit has passed.
    GiveUp,
    /// Polling: sleep, then ask again.
    Sleep(Duration),
    /// Wait in the server's queue for that many milliseconds (at least 1), or without a limit.
    Queue(Option<u32>),
}

#[cfg(test)]
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
