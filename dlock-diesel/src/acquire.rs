//! Takes a lock or a permit. `None`: it was only tried, and another session has it.

use dlock_core::proto::{Ask, Dialect, Hold};

use crate::Error;
use crate::backend::{DialectOf, KeyOf, LockConnection};
use crate::run::{self, refused, run};
use crate::shared::trace::Waiting;

pub(crate) fn lock<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    Waiting::of::<DialectOf<C>>(ask, None).run(|| hold(conn, ask))
}

/// Acquires it, without a span.
pub(crate) fn hold<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    let session = run::session(conn, &ask.key)?;
    let machine =
        DialectOf::<C>::acquire(ask, session).map_err(|failure| refused(failure, &ask.key))?;
    run(conn, machine, &ask.key)
}

pub(crate) fn permit<C: LockConnection>(
    conn: &mut C,
    ask: &Ask,
    permits: u32,
) -> Result<Option<Hold<KeyOf<C>>>, Error> {
    Waiting::of::<DialectOf<C>>(ask, Some(permits)).run(|| {
        let session = run::session(conn, &ask.key)?;
        let machine = DialectOf::<C>::acquire_slot(ask, permits, session)
            .map_err(|failure| refused(failure, &ask.key))?;
        run(conn, machine, &ask.key)
    })
}
