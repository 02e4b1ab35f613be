use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use crate::manager::desk::Calls;

/// The threads of a manager.
#[derive(Default)]
pub(super) struct Threads {
    started: Mutex<Vec<JoinHandle<()>>>,
    /// Those that run callbacks of holders.
    callers: Mutex<Vec<ThreadId>>,
}

impl Threads {
    /// Starts a thread. If the system has none left, `run` is dropped, and what it holds reports its end.
    pub(super) fn start(&self, name: &str, run: impl FnOnce() + Send + 'static) {
        let thread = thread::Builder::new().name(name.to_owned());
        // Not while it is spawned: what is dropped may start another one.
        if let Ok(thread) = thread.spawn(run) {
            let mut threads = lock(&self.started);
            threads.retain(|thread| !thread.is_finished());
            threads.push(thread);
        }
    }

    /// Runs callbacks of holders on this thread, which does nothing else.
    pub(super) fn call(&self, callbacks: Calls) {
        let own = thread::current().id();
        lock(&self.callers).push(own);
        drop(callbacks);
        lock(&self.callers).retain(|caller| *caller != own);
    }

    /// Returns when all have ended. In a callback of a holder it returns at once: others may wait for that thread.
    pub(super) fn join(&self) {
        let own = thread::current().id();
        if lock(&self.callers).contains(&own) {
            return;
        }
        loop {
            let threads = std::mem::take(&mut *lock(&self.started));
            if threads.is_empty() {
                return;
            }
            // The last thing that one of them does may be to start another. The caller may be one of them, too: it
            // opens a connection by code of the user.
            for thread in threads {
                if thread.thread().id() != own {
                    let _ = thread.join();
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
