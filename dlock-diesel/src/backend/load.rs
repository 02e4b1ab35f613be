//! How a statement of the core is sent on a connection of PostgreSQL or MySQL. A macro, because it is the same with and
//! without `.await`.

/// The rows of a statement. Each named statement has a type of its own, by which Diesel finds it prepared.
#[doc(hidden)]
#[macro_export]
macro_rules! __load {
    ($conn:ident, $statement:ident, $($await:tt)*) => {{
        use $crate::__load_row as load_row;
        use $crate::__load_affected as load_affected;
        use $crate::shared::for_each_prepared;
        use $crate::shared::proto::{Columns, Rows};
        use $crate::shared::{ByText, HolderColumns, HolderRow, to_holder};

        match $statement.columns {
            Columns::Number => {
                let row = for_each_prepared!(load_row $conn, $statement, Number, Option<i64>, $($await)*);
                Ok(Rows::Number(row?))
            }
            Columns::NoRow => {
                let row = for_each_prepared!(load_row $conn, $statement, Number, Option<i64>, $($await)*);
                let row = diesel::result::OptionalExtension::optional(row);
                Ok(Rows::Number(row?.unwrap_or(Some(1))))
            }
            Columns::Affected => {
                let affected = for_each_prepared!(load_affected $conn, $statement, $($await)*);
                Ok(Rows::Number(affected?.try_into().ok()))
            }
            Columns::Pair => {
                let row = for_each_prepared!(load_row $conn, $statement, Pair, (Option<i64>, Option<i64>), $($await)*);
                let (first, second) = row?;
                Ok(Rows::Pair(first, second))
            }
            Columns::Holders => {
                let query = ByText::<HolderColumns>::new($statement);
                let rows = query.load::<HolderRow>($conn)$($await)*?;
                Ok(Rows::Holders(rows.into_iter().map(to_holder).collect()))
            }
            Columns::Text => {
                let query = ByText::<diesel::sql_types::Text>::new($statement);
                Ok(Rows::Text(query.get_result($conn)$($await)*?))
            }
        }
    }};
}

#[doc(hidden)]
#[macro_export]
macro_rules! __load_row {
    ([$($name:ident)*] $conn:ident, $statement:ident, $columns:ident, $row:ty, $($await:tt)*) => {{
        use $crate::shared::proto::Prepared;
        use $crate::shared::{ByText, $columns, CoreQuery};

        $crate::__awaited!([$($await)*] match $statement.prepared {
            $(Prepared::$name =>
                CoreQuery::<$columns, { Prepared::$name as u8 }>::new($statement).get_result::<$row>($conn),)*
            Prepared::ByText | Prepared::Never => ByText::<$columns>::new($statement).get_result::<$row>($conn),
        })
    }};
}

#[doc(hidden)]
#[macro_export]
macro_rules! __load_affected {
    ([$($name:ident)*] $conn:ident, $statement:ident, $($await:tt)*) => {{
        use $crate::shared::proto::Prepared;
        use $crate::shared::{ByText, CoreQuery, Number};

        $crate::__awaited!([$($await)*] match $statement.prepared {
            $(Prepared::$name => CoreQuery::<Number, { Prepared::$name as u8 }>::new($statement).execute($conn),)*
            Prepared::ByText | Prepared::Never => ByText::<Number>::new($statement).execute($conn),
        })
    }};
}

/// Awaits the expression of each arm: their types differ.
#[doc(hidden)]
#[macro_export]
macro_rules! __awaited {
    ($await:tt match $prepared:ident.$field:ident { $($pattern:pat => $query:expr,)* }) => {
        match $prepared.$field { $($pattern => $crate::__await!($await $query),)* }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __await {
    ([$($await:tt)*] $query:expr) => {
        $query $($await)*
    };
}
