use crate::Holder;

use super::Request;

/// A statement with binds. Its text is one of few: keys, limits and counters travel as binds.
#[derive(Clone, Debug, PartialEq)]
pub struct Statement {
    /// The text between the binds: one piece more than there are binds.
    pub sql: &'static [&'static str],
    /// What is bound.
    pub binds: Binds,
    /// How the driver finds it again.
    pub prepared: Prepared,
    /// What it answers with.
    pub columns: Columns,
    /// SQLite: the request that it is for. If nobody reads the answer, or the statement fails, the driver gives it up.
    pub request: Option<Request>,
    /// The session is in no queue and in no transaction, and waits for a lock: something else may be asked first.
    pub(crate) between_turns: bool,
}

/// The binds of a [`Statement`]. They are stored inline.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Binds {
    binds: [Option<Bind>; Self::MOST],
    len: usize,
}

/// A value to bind.
#[derive(Clone, Debug, PartialEq)]
pub enum Bind {
    /// A 64-bit integer.
    BigInt(i64),
    /// A 32-bit integer.
    Integer(i32),
    /// Bytes.
    Binary(Vec<u8>),
    /// Text: several keys as one value.
    Text(String),
    /// Text that is NULL.
    NoText,
}

impl Binds {
    const MOST: usize = 5;

    pub(crate) fn push(&mut self, bind: Bind) {
        self.binds[self.len] = Some(bind);
        self.len += 1;
    }

    /// The binds in their order.
    pub fn iter(&self) -> impl Iterator<Item = &Bind> {
        self.binds.iter().flatten()
    }
}

impl<const N: usize> From<[Bind; N]> for Binds {
    fn from(list: [Bind; N]) -> Self {
        let mut binds = Binds::default();
        list.into_iter().for_each(|bind| binds.push(bind));
        binds
    }
}

/// What a [`Statement`] answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// One row of one `BIGINT`, which may be NULL: [`Rows::Number`].
    Number,
    /// No row, which stands for the number 1, or one row of another number: [`Rows::Number`].
    NoRow,
    /// No row, which stands for the number 1, or a row that is not read, which stands for 0: [`Rows::Number`]. The
    /// driver knows it by the server's `SELECT 0` or `SELECT 1` behind the rows.
    AnyRow,
    /// No rows, but how many it has affected: [`Rows::Number`].
    Affected,
    /// One row of two of them: [`Rows::Pair`].
    Pair,
    /// Any number of rows of `BIGINT, TEXT, TEXT, BIGINT, BIGINT, BIGINT`, of which the second, the third and the last
    /// may be NULL, as [`Holder::from_columns`] takes them: [`Rows::Holders`].
    Holders,
    /// One row of one text: [`Rows::Text`].
    Text,
}

/// The rows of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// Of [`Columns::Number`], [`Columns::NoRow`], [`Columns::AnyRow`] and [`Columns::Affected`].
    Number(Option<i64>),
    /// Of [`Columns::Pair`].
    Pair(Option<i64>, Option<i64>),
    /// Of [`Columns::Holders`].
    Holders(Vec<Holder>),
    /// Of [`Columns::Text`].
    Text(String),
}

/// Calls the macro `$callback` with the names of the statements that are sent most, and what follows: those of
/// PostgreSQL whose rows are read, those whose rows are read or not, and those whose rows are not read; then those of
/// MySQL that answer with a number, those that answer with a pair, and those that answer with how many rows they
/// affected.
///
/// Diesel finds a prepared statement by a type or by its text. The drivers make a type for each of these names.
#[doc(hidden)]
#[macro_export]
macro_rules! for_each_prepared {
    ($callback:ident $($arguments:tt)*) => {
        $callback! {
            [PostgresTry PostgresTryShared PostgresTryPair PostgresTryPairShared PostgresSlot]
            [PostgresDroppable PostgresDroppableShared PostgresDroppablePair PostgresDroppablePairShared]
            [
                PostgresFirst PostgresFirstShared PostgresFirstPair PostgresFirstPairShared
                PostgresLimited PostgresLimitedShared PostgresLimitedPair PostgresLimitedPairShared
                PostgresUnlock PostgresUnlockShared PostgresUnlockPair PostgresUnlockPairShared
            ]
            [MysqlDroppable]
            [MysqlSlot]
            [MysqlAcquire MysqlRelease]
            $($arguments)*
        }
    };
}

macro_rules! define_prepared {
    ($([$($name:ident)*])*) => {
        /// How a driver finds a statement again.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(missing_docs, reason = "each is named after its statement")]
        #[repr(u8)]
        pub enum Prepared {
            $($($name,)*)*
            /// By its text.
            ByText,
            /// Not at all: it is prepared, executed once and forgotten.
            Never,
        }

        impl Prepared {
            /// All statements that have a name.
            pub const NAMED: &'static [Prepared] = &[$($(Prepared::$name),*),*];
        }
    };
}

for_each_prepared!(define_prepared);

impl Statement {
    /// A statement that answers with one number.
    pub(crate) fn number(
        prepared: Prepared,
        sql: &'static [&'static str],
        binds: impl Into<Binds>,
    ) -> Self {
        let binds = binds.into();
        debug_assert_eq!(sql.len(), binds.len + 1);
        Self {
            sql,
            binds,
            prepared,
            columns: Columns::Number,
            request: None,
            between_turns: false,
        }
    }

    pub(crate) fn between_turns(mut self) -> Self {
        self.between_turns = true;
        self
    }

    pub(crate) fn columns(mut self, columns: Columns) -> Self {
        self.columns = columns;
        self
    }

    /// The same statement, for a session that does not know the prepared one.
    pub(crate) fn never_kept(mut self) -> Self {
        self.prepared = Prepared::Never;
        self
    }

    /// The text, with `?` for each bind: for tests and messages.
    pub fn text(&self) -> String {
        self.sql.join("?")
    }
}
