INSERT INTO dlock_visitors VALUES ('the first process that came along');
