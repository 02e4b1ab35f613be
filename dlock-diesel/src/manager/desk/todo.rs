//! What is to be done after news, with nothing locked.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dlock_core::proto::manager::Action;

use super::{Callback, Slot};

/// First the actions, in their order. Without them the machine waits for ever, so nothing that could panic or block
/// comes before them.
#[derive(Debug)]
#[must_use = "the machine waits for it"]
pub struct Todo {
    /// What the machine wants.
    pub actions: Vec<Action>,
    /// What tells a subscriber of `tracing`, on this thread.
    pub traces: Calls,
    /// The callbacks of holders, on a thread of their own.
    pub callbacks: Calls,
    /// With what their holders' callbacks own, which may be other locks of the manager.
    pub told: Vec<Arc<Slot>>,
}

/// They are called when it is dropped: also where no thread is left to do it.
#[derive(Default)]
pub struct Calls(pub(crate) Vec<Callback>);

impl Calls {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        for callback in self.0.drain(..) {
            // The panic hook has told of it. The others are called.
            let _ = catch_unwind(AssertUnwindSafe(callback));
        }
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Calls").field(&self.0.len()).finish()
    }
}
