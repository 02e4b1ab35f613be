//! Takes a lock or a permit. `None`: it was only tried, and another session has it.

use std::time::Duration;

use dlock_core::proto::{Ask, Dialect, Hold};
use dlock_diesel::shared::trace::Waiting;

use crate::Error;
use crate::backend::{Cancel, DialectOf, KeyOf, LockConnection};
use crate::run::{self, refused, run_within};

pub(crate) async fn lock<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    cancel: &mut Option<Cancel>,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    let waiting = Waiting::of::<DialectOf<C>>(ask, None);
    waiting
        .during(hold(conn, ask, cancel, ask.wait.limit))
        .await
}

/// Acquires it, without a span. `limit` is when the server counts as gone.
pub(crate) async fn hold<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    cancel: &mut Option<Cancel>,
    limit: Option<Duration>,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    let session = run::session(conn, &ask.key)?;
    let machine =
        DialectOf::<C>::acquire(ask, session).map_err(|failure| refused(failure, &ask.key))?;
    run_within(conn, machine, &ask.key, cancel, limit).await
}

pub(crate) async fn permit<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    permits: u32,
    cancel: &mut Option<Cancel>,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    let acquiring = async {
        let session = run::session(conn, &ask.key)?;
        let machine = DialectOf::<C>::acquire_slot(ask, permits, session)
            .map_err(|failure| refused(failure, &ask.key))?;
        run_within(conn, machine, &ask.key, cancel, ask.wait.limit).await
    };
    let waiting = Waiting::of::<DialectOf<C>>(ask, Some(permits));
    waiting.during(acquiring).await
}
