use std::marker::PhantomData;

use diesel::backend::Backend;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::serialize::ToSql;
use diesel::sql_types::{BigInt, Binary, HasSqlType, Integer, Nullable, Text};
use dlock_core::Holder;
use dlock_core::proto::{Bind, Binds, Prepared, Statement};

/// The row of `Columns::Number`.
pub type Number = Nullable<BigInt>;

/// The row of `Columns::Pair`.
pub type Pair = (Nullable<BigInt>, Nullable<BigInt>);

/// The row of `Columns::Holders`.
pub type HolderColumns = (
    BigInt,
    Nullable<Text>,
    Nullable<Text>,
    BigInt,
    BigInt,
    Nullable<BigInt>,
);

/// A row of [`HolderColumns`].
pub type HolderRow = (i64, Option<String>, Option<String>, i64, i64, Option<i64>);

/// Makes a holder of its row.
pub fn to_holder((id, name, user, exclusive, granted, since): HolderRow) -> Holder {
    Holder::from_columns(id, name, user, exclusive, granted, since)
}

/// A statement of the core as a Diesel query, with rows of the SQL type `ST`.
///
/// Diesel finds a prepared statement by the type of the query or, more slowly, by its text. `NAME` is the number of a
/// [`Prepared`] statement, so each of them has a type.
#[derive(Debug)]
pub struct CoreQuery<ST, const NAME: u8> {
    statement: Statement,
    columns: PhantomData<fn() -> ST>,
}

/// A query that Diesel finds by its text.
pub type ByText<ST> = CoreQuery<ST, { Prepared::ByText as u8 }>;

impl<ST, const NAME: u8> CoreQuery<ST, NAME> {
    /// Makes a query of a statement.
    pub fn new(statement: Statement) -> Self {
        debug_assert!(
            NAME == statement.prepared as u8 || statement.prepared == Prepared::Never,
            "BUG: {:?} with {:?} is not in the list of its server",
            statement.prepared,
            statement.columns
        );
        Self {
            statement,
            columns: PhantomData,
        }
    }
}

impl<ST, const NAME: u8> Query for CoreQuery<ST, NAME> {
    type SqlType = ST;
}

impl<ST, C, const NAME: u8> RunQueryDsl<C> for CoreQuery<ST, NAME> {}

impl<ST, const NAME: u8> QueryId for CoreQuery<ST, NAME> {
    type QueryId = CoreQuery<(), NAME>;
    const HAS_STATIC_QUERY_ID: bool = NAME < Prepared::ByText as u8;
}

impl<ST, DB, const NAME: u8> QueryFragment<DB> for CoreQuery<ST, NAME>
where
    DB: Backend + HasSqlType<BigInt> + HasSqlType<Integer> + HasSqlType<Binary> + HasSqlType<Text>,
    i64: ToSql<BigInt, DB>,
    i32: ToSql<Integer, DB>,
    Vec<u8>: ToSql<Binary, DB>,
    String: ToSql<Text, DB>,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        let Statement { sql, binds, .. } = &self.statement;
        if self.statement.prepared == Prepared::Never {
            out.unsafe_to_cache_prepared();
        }
        push(&mut out, sql, binds)
    }
}

/// Writes a text of the core with its binds.
pub(crate) fn push<'b, DB>(
    out: &mut AstPass<'_, 'b, DB>,
    sql: &[&str],
    binds: &'b Binds,
) -> QueryResult<()>
where
    DB: Backend + HasSqlType<BigInt> + HasSqlType<Integer> + HasSqlType<Binary> + HasSqlType<Text>,
    i64: ToSql<BigInt, DB>,
    i32: ToSql<Integer, DB>,
    Vec<u8>: ToSql<Binary, DB>,
    String: ToSql<Text, DB>,
{
    let (before, between) = sql.split_first().expect("BUG: there is a text");
    out.push_sql(before);
    for (bind, sql) in binds.iter().zip(between) {
        match bind {
            Bind::BigInt(value) => out.push_bind_param::<BigInt, _>(value)?,
            Bind::Integer(value) => out.push_bind_param::<Integer, _>(value)?,
            Bind::Binary(value) => out.push_bind_param::<Binary, _>(value)?,
            Bind::Text(value) => out.push_bind_param::<Text, _>(value)?,
            Bind::NoText => out.push_bind_param::<Nullable<Text>, _>(&None::<String>)?,
        }
        out.push_sql(sql);
    }
    Ok(())
}
