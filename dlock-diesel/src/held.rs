use std::fmt;
use std::marker::PhantomData;

use diesel::backend::Backend;
use diesel::expression::{AppearsOnTable, SelectableExpression, ValidGrouping, is_aggregate};
use diesel::prelude::*;
use diesel::query_builder::{AstPass, QueryFragment, QueryId};
use diesel::serialize::ToSql;
use diesel::sql_types::{BigInt, Binary, Bool, HasSqlType, Integer, Text};
use dlock_core::proto::Condition;

use crate::query;

/// A condition for your own statements that is true only in the session that holds the lock:
/// [`AdvisoryLockGuard::held`](crate::AdvisoryLockGuard::held) makes one.
///
/// It is an expression of Diesel of the SQL type [`Bool`]. It owns its values, so you can use the guard as the
/// connection while the expression is alive.
///
/// # Examples
///
/// ```no_run
/// use diesel::prelude::*;
/// use dlock_diesel::AdvisoryLockExt;
///
/// # diesel::table! { accounts { id -> Integer, balance -> Integer } }
/// # let mut conn = PgConnection::establish("")?;
/// let mut lock = conn.advisory_lock(("bank", "account/1")).acquire()?;
/// let changed = diesel::update(accounts::table.find(1).filter(lock.held()))
///     .set(accounts::balance.eq(0))
///     .execute(&mut *lock)?;
/// assert_eq!(changed, 1, "the lock was lost");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "an expression does nothing until it is part of a statement"]
pub struct Held<DB> {
    condition: Condition,
    backend: PhantomData<fn() -> DB>,
}

impl<DB> Held<DB> {
    pub(crate) fn new(condition: Condition) -> Self {
        Self {
            condition,
            backend: PhantomData,
        }
    }
}

impl<DB> Clone for Held<DB> {
    fn clone(&self) -> Self {
        Self::new(self.condition.clone())
    }
}

impl<DB> fmt::Debug for Held<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Held").field(&self.condition).finish()
    }
}

impl<DB> Expression for Held<DB> {
    type SqlType = Bool;
}

impl<DB, QS: ?Sized> AppearsOnTable<QS> for Held<DB> {}

impl<DB, QS: ?Sized> SelectableExpression<QS> for Held<DB> {}

impl<DB, GB> ValidGrouping<GB> for Held<DB> {
    type IsAggregate = is_aggregate::Never;
}

/// Each server has one text for a lock and another for several, so Diesel finds the statement by its text.
impl<DB: 'static> QueryId for Held<DB> {
    type QueryId = Held<DB>;
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<DB> QueryFragment<DB> for Held<DB>
where
    DB: Backend + HasSqlType<BigInt> + HasSqlType<Integer> + HasSqlType<Binary> + HasSqlType<Text>,
    i64: ToSql<BigInt, DB>,
    i32: ToSql<Integer, DB>,
    Vec<u8>: ToSql<Binary, DB>,
    String: ToSql<Text, DB>,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        query::push(&mut out, self.condition.sql, &self.condition.binds)
    }
}
