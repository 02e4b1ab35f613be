DELETE FROM dlock_visitors;
