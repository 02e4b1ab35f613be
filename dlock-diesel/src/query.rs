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
///
/// The number is [the statement's](Statement::number), if it has one.
#[derive(Debug)]
pub struct CoreQuery<ST, const NUMBER: u8 = BY_TEXT> {
    statement: Statement,
    columns: PhantomData<fn() -> ST>,
}

/// No statement has this number: Diesel finds the prepared statement by its text.
pub(crate) const BY_TEXT: u8 = u8::MAX;

impl<ST, const NUMBER: u8> CoreQuery<ST, NUMBER> {
    /// The query that is `statement`.
    pub fn new(statement: Statement) -> Self {
        debug_assert!(NUMBER == BY_TEXT || statement.number == Some(NUMBER));
        Self {
            statement,
            columns: PhantomData,
        }
    }
}

impl<ST, const NUMBER: u8> Query for CoreQuery<ST, NUMBER> {
    type SqlType = ST;
}

impl<ST, C, const NUMBER: u8> RunQueryDsl<C> for CoreQuery<ST, NUMBER> {}

impl<ST, const NUMBER: u8> QueryId for CoreQuery<ST, NUMBER> {
    type QueryId = CoreQuery<(), NUMBER>;
    const HAS_STATIC_QUERY_ID: bool = NUMBER != BY_TEXT;
}

impl<ST, DB, const NUMBER: u8> QueryFragment<DB> for CoreQuery<ST, NUMBER>
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
