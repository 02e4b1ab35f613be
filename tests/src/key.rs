use std::{
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

/// A lock key that no other call returns, in this process or another one.
pub fn unique_key(test_name: &str) -> String {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    // Process ids come again, and servers of `TEST_URLS` outlive the process.
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros());
    format!("{test_name}/{:x}-{now:x}-{call:x}", process::id())
}
