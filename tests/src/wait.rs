use std::{
    thread,
    time::{Duration, Instant},
};

/// How long tests wait for something that should happen at once: machines are slow at times.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Polls until `condition` holds. For states that the server shows; a sleep proves nothing.
///
/// # Panics
///
/// After [`PATIENCE`], naming `what`.
#[track_caller]
pub fn wait_for(what: impl std::fmt::Display, condition: impl FnMut() -> bool) {
    wait_for_within(PATIENCE, what, condition);
}

/// [`wait_for`] with another limit.
///
/// # Panics
///
/// After `limit`, naming `what`.
#[track_caller]
pub fn wait_for_within(
    limit: Duration,
    what: impl std::fmt::Display,
    mut condition: impl FnMut() -> bool,
) {
    let begin = Instant::now();
    while !condition() {
        assert!(
            begin.elapsed() < limit,
            "waited {} s in vain for {what}",
            limit.as_secs_f32()
        );
        thread::sleep(Duration::from_millis(5));
    }
}
