//! A transaction that is left open under a lock costs the connection.

use dlock_diesel_async::{AdvisoryLockExt, Error};
use dlock_tests::{Server, on_every_network_server_async, unique_key};

use crate::support::*;

on_every_network_server_async! {
    async fn a_transaction_left_open_under_the_lock_is_rolled_back_and_reported<C: LockTest>(server: &Server) {
        let key = unique_key("async_left_open");
        let table = Table::new(server);
        let (mut conn, mut observer) = (C::open(server).await, C::observer(server));
        let mut lock = conn.advisory_lock(&key).acquire().await.expect("a free lock");
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(1)).await;
        begin(&mut *lock).await;
        lock.execute_sql(&table.insert(2)).await;
        let result = lock.release().await.map(drop);
        assert!(matches!(result, Err(Error::TransactionLeftOpen { .. })), "{result:?}");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert!(is_broken(&mut conn));

        let mut conn = C::open(server).await;
        let run = conn.advisory_lock(&key).run(async |conn| {
            begin(conn).await;
            conn.batch_execute(&table.insert(3)).await?;
            Ok::<_, Error>(())
        });
        let result = run.await;
        assert!(matches!(result, Err(Error::TransactionLeftOpen { .. })), "{result:?}");
        wait_until_free(&mut observer, &key);
        assert_eq!(table.rows(&mut observer), 0);
        assert!(is_broken(&mut conn));
    }
}
