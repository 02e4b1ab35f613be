use std::borrow::Cow;

/// A statement with binds, which answers with one row of one `BIGINT` (or, for
/// [`holders`](crate::Dialect::holders), with the columns of [`Holder`](crate::Holder)).
///
/// Its text depends on [`pieces`](Self::pieces) of SQL alone: keys travel as binds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// SQL and binds in turn.
    pub pieces: Vec<Piece>,
    /// Whether to keep the prepared statement: its text is one of few.
    pub cached: bool,
}

/// A part of a [`Statement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text of the statement.
    Sql(Cow<'static, str>),
    /// A 64-bit integer to bind.
    BigInt(i64),
    /// A 32-bit integer to bind.
    Integer(i32),
    /// Bytes to bind.
    Binary(Vec<u8>),
}

impl Statement {
    /// A statement whose text is one of few, so that it is worth to be kept prepared.
    pub fn cached(pieces: Vec<Piece>) -> Self {
        Self {
            pieces,
            cached: true,
        }
    }

    /// A statement whose text is new nearly each time.
    pub fn uncached(pieces: Vec<Piece>) -> Self {
        Self {
            pieces,
            cached: false,
        }
    }

    /// The text, with `?` for each bind: for tests and messages.
    ///
    /// # Examples
    ///
    /// ```
    /// use dlock_core::{Piece, Statement};
    ///
    /// let statement = Statement::cached(vec!["SELECT ".into(), Piece::BigInt(1)]);
    /// assert_eq!(statement.text(), "SELECT ?");
    /// ```
    pub fn text(&self) -> String {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Sql(sql) => sql.as_ref(),
                _ => "?",
            })
            .collect()
    }
}

#[cfg(feature = "postgres")]
impl Statement {
    /// The text with the numbers in it, for where there are no binds. There must be no other binds.
    pub(crate) fn inlined(&self) -> String {
        self.pieces
            .iter()
            .map(|piece| match piece {
                Piece::Sql(sql) => sql.to_string(),
                Piece::BigInt(number) => format!("'{number}'::bigint"),
                Piece::Integer(number) => format!("'{number}'::int"),
                Piece::Binary(_) => unreachable!("BUG: names are not put into text"),
            })
            .collect()
    }
}

impl From<&'static str> for Piece {
    fn from(sql: &'static str) -> Self {
        Piece::Sql(Cow::Borrowed(sql))
    }
}

impl From<String> for Piece {
    fn from(sql: String) -> Self {
        Piece::Sql(Cow::Owned(sql))
    }
}
