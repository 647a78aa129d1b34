from se_inject.cli import main

main()
