//! One clock for all processes of the machine.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since some moment, which is the same for all processes until the machine is started again.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a monotonic clock");
    let seconds = u64::try_from(time.tv_sec()).expect("the clock begins at zero");
    let nanoseconds = u64::try_from(time.tv_nsec()).expect("a part of a second");
    seconds * 1_000_000_000 + nanoseconds
}
