use diesel::connection::SimpleConnection;
use diesel::prelude::*;

use crate::support::{Connect, MysqlConnection, PgConnection};

diesel::table! {
    dlock_accounts {
        id -> Integer,
        balance -> Integer,
    }
}

/// Five accounts. Number 0 is empty, the others hold 250 each.
pub(crate) trait Bank: Connect {
    fn open(&mut self) -> QueryResult<()> {
        self.close()?;
        self.batch_execute(
            "CREATE TABLE dlock_accounts (id INT PRIMARY KEY, balance INT NOT NULL)",
        )?;
        self.batch_execute(
            "INSERT INTO dlock_accounts VALUES (0, 0), (1, 250), (2, 250), (3, 250), (4, 250)",
        )
    }

    fn close(&mut self) -> QueryResult<()> {
        self.batch_execute("DROP TABLE IF EXISTS dlock_accounts")
    }

    /// Overrides the server's default. At higher levels, some servers refuse to overwrite what changed since the read.
    fn set_read_committed(&mut self) -> QueryResult<()>;
    fn total(&mut self) -> QueryResult<i64>;
    fn balance(&mut self, id: i32) -> QueryResult<i32>;
    fn set_balance(&mut self, id: i32, balance: i32) -> QueryResult<()>;
}

macro_rules! bank {
    ($Conn:ty, $characteristics:literal) => {
        impl Bank for $Conn {
            fn set_read_committed(&mut self) -> QueryResult<()> {
                self.batch_execute(concat!(
                    "SET SESSION ",
                    $characteristics,
                    " ISOLATION LEVEL READ COMMITTED"
                ))
            }

            fn total(&mut self) -> QueryResult<i64> {
                let sum = diesel::dsl::sum(dlock_accounts::balance);
                let total: Option<i64> = dlock_accounts::table.select(sum).first(self)?;
                Ok(total.unwrap_or_default())
            }

            fn balance(&mut self, id: i32) -> QueryResult<i32> {
                let account = dlock_accounts::table.find(id);
                account.select(dlock_accounts::balance).first(self)
            }

            fn set_balance(&mut self, id: i32, balance: i32) -> QueryResult<()> {
                diesel::update(dlock_accounts::table.find(id))
                    .set(dlock_accounts::balance.eq(balance))
                    .execute(self)?;
                Ok(())
            }
        }
    };
}

bank!(PgConnection, "CHARACTERISTICS AS TRANSACTION");
bank!(MysqlConnection, "TRANSACTION");
