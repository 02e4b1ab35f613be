//! What cancels a statement, from another connection.

use tokio::runtime::Handle;

use crate::backend::Cancel;

pub(crate) fn boxed(cancel: impl Future + Send + 'static) -> Cancel {
    Box::pin(async move {
        cancel.await;
    })
}

/// Cancels what runs on the connection.
pub(crate) fn spawn(runtime: Option<&Handle>, cancel: Option<Cancel>) {
    if let (Some(runtime), Some(cancel)) = (runtime, cancel) {
        runtime.spawn(cancel);
    }
}

/// What cancels the statement that runs on a connection, if the body that sent it is dropped.
pub(crate) struct OnDrop {
    cancel: Option<Cancel>,
    /// The body may be dropped outside of its runtime.
    runtime: Option<Handle>,
}

impl OnDrop {
    pub(crate) fn new(cancel: Cancel) -> Self {
        Self {
            cancel: Some(cancel),
            runtime: Handle::try_current().ok(),
        }
    }

    /// The body was dropped. The connection is no longer fit for others: a late cancel hits what it is asked next.
    pub(crate) fn cancel(&mut self) {
        spawn(self.runtime.as_ref(), self.cancel.take());
    }
}
