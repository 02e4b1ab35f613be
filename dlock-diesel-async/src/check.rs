use dlock_core::proto::Dialect;
use dlock_core::{LockKey, Report};
use dlock_diesel::shared;

use crate::Error;
use crate::backend::{DialectOf, LockConnection};
use crate::run::{self, run};

/// Looks for what would keep locks on this connection from excluding, or from being kept.
pub(crate) async fn check<C: LockConnection>(conn: &mut C) -> Result<Report, Error> {
    let key = LockKey::from(shared::CHECKED);
    let session = run::session(conn, &key)?;
    shared::may_check(&key, session)?;
    run(conn, DialectOf::<C>::check(), &key, None).await
}
