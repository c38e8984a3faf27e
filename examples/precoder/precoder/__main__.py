from precoder.cli import main

raise SystemExit(main())
