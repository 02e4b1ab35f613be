use std::marker::PhantomData;

use diesel::backend::Backend;
use diesel::prelude::*;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::serialize::ToSql;
use diesel::sql_types::{BigInt, Binary, HasSqlType, Integer, Nullable, Text};
use dlock_core::{Holder, Piece, Statement};

/// The one value that a statement of a machine answers with.
pub type Value = Nullable<BigInt>;

/// A row of [`HolderColumns`].
pub type HolderRow = (i64, Option<String>, Option<String>, i64, i64, Option<i64>);

/// A holder from its row.
pub fn to_holder((id, name, user, exclusive, granted, since): HolderRow) -> Holder {
    Holder::from_columns(id, name, user, exclusive, granted, since)
}

/// The columns of `dlock_core::Holder::from_columns`.
pub type HolderColumns = (
    BigInt,
    Nullable<Text>,
    Nullable<Text>,
    BigInt,
    BigInt,
    Nullable<BigInt>,
);

/// A statement of the core as a Diesel query, with rows of the SQL type `ST`.
#[derive(Debug)]
pub struct CoreQuery<ST> {
    statement: Statement,
    columns: PhantomData<fn() -> ST>,
}

impl<ST> CoreQuery<ST> {
    /// The query that is `statement`.
    pub fn new(statement: Statement) -> Self {
        Self {
            statement,
            columns: PhantomData,
        }
    }
}

impl<ST> Query for CoreQuery<ST> {
    type SqlType = ST;
}

impl<ST, C> RunQueryDsl<C> for CoreQuery<ST> {}

/// Without a static id Diesel caches the prepared statement by its text.
impl<ST> QueryId for CoreQuery<ST> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<ST, DB> QueryFragment<DB> for CoreQuery<ST>
where
    DB: Backend + HasSqlType<BigInt> + HasSqlType<Integer> + HasSqlType<Binary>,
    i64: ToSql<BigInt, DB>,
    i32: ToSql<Integer, DB>,
    Vec<u8>: ToSql<Binary, DB>,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        if !self.statement.cached {
            out.unsafe_to_cache_prepared();
        }
        for piece in &self.statement.pieces {
            match piece {
                Piece::Sql(sql) => out.push_sql(sql),
                Piece::BigInt(value) => out.push_bind_param::<BigInt, _>(value)?,
                Piece::Integer(value) => out.push_bind_param::<Integer, _>(value)?,
                Piece::Binary(value) => out.push_bind_param::<Binary, _>(value)?,
            }
        }
        Ok(())
    }
}
